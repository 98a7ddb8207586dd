"""Names of faults, and the random numbers that belong to a sample."""

import numpy as np
import pytest

from lightning_abpem.data.audio_corruptions import AUDIO_KINDS
from lightning_abpem.data.corruptions import Corruption, Sensor, sample_rng
from lightning_abpem.data.image_corruptions import HELD_OUT_IMAGE_KINDS, IMAGE_KINDS

FOG = Corruption("image", "fog", 3)


def test_the_benchmarks_kinds():
    assert (len(IMAGE_KINDS), len(AUDIO_KINDS), len(HELD_OUT_IMAGE_KINDS)) == (15, 6, 4)
    assert not set(IMAGE_KINDS) & set(HELD_OUT_IMAGE_KINDS)
    every: dict[Sensor, tuple[str, ...]] = {"image": (*IMAGE_KINDS, *HELD_OUT_IMAGE_KINDS), "audio": AUDIO_KINDS}
    for modality, kinds in every.items():
        assert [Corruption(modality, kind, 1).kind for kind in kinds] == list(kinds)
    assert str(Corruption("audio", "gaussian_noise", 5)) == "audio: gaussian noise"


def numbers(seed=1, corruption=FOG, key="a"):
    return sample_rng(seed, corruption, key).random(4).tolist()


def test_a_sample_has_its_own_random_numbers():
    assert numbers() == numbers()
    others = [
        numbers(seed=2),
        numbers(key="b"),
        numbers(corruption=Corruption("image", "fog", 4)),
        numbers(corruption=Corruption("image", "snow", 3)),
        numbers(corruption=Corruption("image", "gaussian_noise", 3)),
        numbers(corruption=Corruption("audio", "gaussian_noise", 3)),
    ]
    assert len({tuple(row) for row in [numbers(), *others]}) == 7


def test_neighbouring_samples_are_not_alike():
    first = np.array([numbers(key=str(i))[0] for i in range(2000)])
    assert abs(first.mean() - 0.5) < 4 * (1 / 12 / 2000) ** 0.5
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.08


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("radar", "fog", 1), 'Expected `modality` to be "audio" or "image", but got \'radar\''),
        (("audio", "fog", 1), "Expected `kind` of audio to be one of gaussian_noise, traffic, .* but got 'fog'"),
        (("image", "haze", 1), "Expected `kind` of image to be one of gaussian_noise, .* but got 'haze'"),
        (("image", "fog", 0), r"Expected `severity` to be an integer in \[1, 5\], but got 0"),
        (("image", "fog", 6), r"but got 6"),
        (("image", "fog", 2.5), r"but got 2.5"),
        (("image", "fog", True), r"but got True"),
    ],
)
def test_faults_that_do_not_exist(arguments, words):
    with pytest.raises(ValueError, match=words):
        Corruption(*arguments)
