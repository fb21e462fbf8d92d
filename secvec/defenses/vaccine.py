"""Vaccine: the starting model learns to answer safely while its hidden states are perturbed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secvec.defenses.base import AlignmentStageDefense, Defense
from secvec.settings.schema import Rate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secvec.data.batch import Batch


class Vaccine(AlignmentStageDefense):
    """Before the fine-tune: min over w of the alignment loss at hidden states e + d (Huang et al., arXiv 2402.01109).

    d_l = `rho` g_l / |(g_1, ..., g_L)| is the perturbation of layer l that raises the loss most, to first order; g_l is
    the gradient of the loss with respect to the output of that layer. Two passes in every step. Our decision: outputs
    of whole layers (their code takes those of the attention). Theirs is a LoRA on thousands of safe answers; ours are
    the vector's prompts and KL rows.
    """

    rho: Rate = 2.0

    def hardening(self) -> Defense:
        """The loss under perturbation."""
        return Perturbed(name=self.name, rho=self.rho)


class Perturbed(Defense):
    """The loss at perturbed hidden states."""

    rho: Rate

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Nats per response token; `unperturbed` is logged."""
        import torch
        import torch.distributed as dist

        from secvec.training.activations import each_output, layer_outputs
        from secvec.training.losses import response_loss

        with layer_outputs(model) as outputs:
            plain = response_loss(model, batch)
        gradients = torch.autograd.grad(plain, outputs)
        square = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
        if dist.is_initialized():
            dist.all_reduce(square)  # one perturbation of all rows, as a single process has it
        norm = square.sqrt().clamp_min(1e-12)
        with each_output(model, lambda number, hidden: hidden + (self.rho / norm).to(hidden) * gradients[number]):
            loss = response_loss(model, batch)
        return {"loss": loss, "unperturbed": plain.detach()}
