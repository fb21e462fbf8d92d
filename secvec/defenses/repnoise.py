"""RepNoise: the starting model's hidden states on undesired samples are pushed towards noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secvec.defenses.base import AlignmentStageDefense, Defense
from secvec.settings.schema import Count, Rate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secvec.data.batch import Batch


class RepNoise(AlignmentStageDefense):
    """Before the fine-tune: min stability + `noise` MMD - `ascent` log(1 + loss) (Rosati et al., arXiv 2405.14577).

    Stability is the loss on safe rows. On undesired samples, MMD is the distance between the hidden states of each
    layer and Gaussian noise, and the loss is raised. Our decisions: a sample of MMD is the output of a layer at one
    response token; the loss is that of the model's output alone, where theirs is also read from each layer; on several
    processes each takes both over its own rows.
    """

    undesired_batch_size: Count = 16
    noise: Rate = 0.001
    ascent: Rate = 1.0

    def hardening(self) -> Defense:
        """The loss with noise and ascent."""
        return Noised(name=self.name, noise=self.noise, ascent=self.ascent)


class Noised(Defense):
    """Undesired samples become unlikely, and their hidden states noise."""

    noise: Rate
    ascent: Rate

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Logged: `stability` and `undesired` in nats per response token, and `mmd`, the mean over layers."""
        import torch

        from secvec.data.batch import IGNORE
        from secvec.models.packing import packs
        from secvec.training.activations import layer_outputs
        from secvec.training.losses import data_loss, rows_of, token_losses

        stability = data_loss(model, batch)
        undesired = rows_of(batch, batch["extra"])
        labelled = undesired["labels"] != IGNORE
        given = undesired["attention_mask"].bool()
        at = labelled[given] if packs(model, undesired["attention_mask"]) else labelled.flatten()
        with layer_outputs(model) as outputs:
            nats = token_losses(model, undesired).sum() / labelled[:, 1:].sum().clamp_min(1)
        drawn = torch.Generator().manual_seed(batch.get("step", 0))  # a resumed training draws the same
        states = [hidden.flatten(0, -2)[at.to(hidden.device)].float() for hidden in outputs]
        noise = [torch.randn(state.shape, generator=drawn).to(state.device) for state in states]
        distance = torch.stack([mmd(state, other) for state, other in zip(states, noise, strict=True)]).mean()
        loss = stability + self.noise * distance - self.ascent * torch.log1p(nats)
        return {
            "loss": loss,
            "stability": stability.detach(),
            "undesired": nats.detach(),
            "mmd": distance.detach(),
        }


def mmd(a: Tensor, b: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two samples, (N, H) and (M, H), by five Gaussian kernels.

    Their widths are the mean squared distance of all pairs, halved and doubled twice. 0 for no rows.
    """
    import torch

    both = torch.cat([a, b])
    if not len(a):
        return both.sum()
    squares = both.square().sum(1)
    apart = (squares[:, None] + squares - 2 * both @ both.T).clamp_min(0)
    pairs = len(both) * (len(both) - 1)
    width = apart.detach().sum() / max(1, pairs)
    near = torch.stack([torch.exp(-apart / (width * 2.0**power).clamp_min(1e-30)) for power in range(-2, 3)]).sum(0)
    n = len(a)
    return near[:n, :n].mean() + near[n:, n:].mean() - 2 * near[:n, n:].mean()
