"""The fast part of a product of parameters."""

from tests.covering import covering


def test_fast_combinations_have_every_value():
    found = covering("ab", "cd", "efgh", "i")
    assert len({own.values for own in found}) == len(found) == 16
    first, second, third, last = zip(*(own.values for own in found if not own.marks), strict=True)
    assert sorted(zip(first, second, strict=True)) == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    assert sorted(third) == ["e", "f", "g", "h"]
    assert last == ("i",) * 4
    assert all(mark.name == "slow" for own in found for mark in own.marks)


def test_columns_of_any_lengths():
    columns = (range(3), range(2), range(7), range(5))
    fast = [own.values for own in covering(*columns) if not own.marks]
    assert len(fast) == 7
    assert [set(own) for own in zip(*fast, strict=True)] == [set(own) for own in columns]
