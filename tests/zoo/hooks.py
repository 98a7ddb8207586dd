"""Hooks that run in the gradients of a pass, or that a forward registers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.zoo.nets import Net, entry


@entry("a hook on the fusion keeps the gradients of its output, as GradCAM does")
def keeps_gradients() -> Net:
    net, kept = Net(), []

    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        kept.append(grad_output[0].norm())

    net.fusion.register_full_backward_hook(hook)
    return net


@entry("hooks on weights that adapt keep the norms of their gradients, as loggers do")
def keeps_norms() -> Net:
    net = Net()
    norms: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(gradient: Tensor) -> None:
            norms.setdefault(name, []).append(gradient.norm())

        return hook

    for name, p in net.fusion[0].attn.q.named_parameters():
        p.register_hook(watch(name))
    return net


@entry("hooks that the first call registers: for gradients, with keywords, and on a weight")
class RegistersHooks(Net):
    def build(self):
        self.is_hooked = False

    def forward(self, audio, video):
        if not self.is_hooked:
            self.is_hooked = True
            self.fusion[0].register_full_backward_hook(lambda *_: None)
            self.head.register_forward_pre_hook(lambda module, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True)
            self.head.register_forward_hook(lambda *args: 1 + args[-1], with_kwargs=True, always_call=True)
            self.fusion[0].attn.q.weight.register_hook(lambda gradient: None)
        return super().forward(audio, video)


@entry("a hook that takes itself away in its first call")
class RunsOnce(Net):
    def build(self):
        def once(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            handle.remove()
            return 2 * output

        handle = self.audio.register_forward_hook(once)
