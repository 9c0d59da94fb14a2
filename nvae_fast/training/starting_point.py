"""Starting points: the weights of a checkpoint, official or ours, in a model that is to be trained from its first step."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nvae_fast.models.nvae import NVAE
from nvae_fast.models.states import some
from nvae_fast.training import checkpoint
from nvae_fast.training.step import layers_needing_data_init, mark_needing_data_init

# Names of parameters and buffers that a sentence shows.
_NAMED = 10
_SPECTRAL = "spectral."


@dataclass(frozen=True)
class StartingPoint:
    """What `init_from` took from a checkpoint. path: its file; step: its optimizer step, None where it does not say; taken:
    names of the parameters and buffers that have its values; left: those of the model that keep their own, with both shapes
    where they differ; unused: those of the checkpoint that the model does not have; weights: "ema" for the averages of the
    checkpoint's weights, which are taken where it has them, else "model"."""

    path: str
    step: int | None
    taken: tuple[str, ...]
    left: tuple[str, ...]
    unused: tuple[str, ...]
    weights: str = "model"

    def summary(self) -> str:
        """Sentences with the counts, and the first ten names of what was not taken."""
        known = [] if self.step is None else [f"step {self.step}"]
        known += ["the averages of its weights"] if self.weights == "ema" else []
        at = f" ({', '.join(known)})" if known else ""
        count = len(self.taken) + len(self.left)
        lines = [f"started from {self.path}{at}: {len(self.taken)} of {count} parameters and buffers taken"]
        if self.left:
            lines.append(f"{len(self.left)} initialised anew: {some(list(self.left), _NAMED)}")
        if self.unused:
            lines.append(f"{len(self.unused)} of the checkpoint not used: {some(list(self.unused), _NAMED)}")
        return "\n".join(lines)


def init_from(model: NVAE, path: str | os.PathLike[str]) -> StartingPoint:
    """Give a model the weights of a checkpoint, as far as they fit, before it is trained.

    Takes every parameter and buffer whose name and shape are the same; the others keep their values. Layers with data-dependent
    initialisation are initialised by the first batch unless all of their parameters were taken. The spectral regulariser's
    vectors are taken when all of them fit. Only weights are taken: the optimizer and the step number start anew.

    model: an NVAE, changed in place, from which no `Step` or `Trainer` has been made yet. path: a checkpoint of ours, its run
    folder, or an official checkpoint. Raises CheckpointError or ValueError, with the model unchanged, for a file that
    cannot be loaded (see `load_model`) or of which no parameter fits.
    """
    try:
        source, facts = checkpoint.load_model(path)
    except (checkpoint.CheckpointError, ValueError) as error:
        raise type(error)(f"init_from (--init-from): {error}") from error
    found, own = source.state_dict(), model.state_dict()
    if facts["kind"] == "official":  # such files have no vectors of the regulariser
        found = {name: value for name, value in found.items() if not name.startswith(_SPECTRAL)}
    fits = {name for name, value in found.items() if name in own and value.shape == own[name].shape}
    spectral = {name for name in own if name.startswith(_SPECTRAL)}
    if not spectral <= fits:
        fits -= spectral
    if not any(name in fits for name, _ in model.named_parameters()):
        raise ValueError(
            f"init_from (--init-from): no parameter of {facts['path']} has the name and the shape of one of this model"
        )
    waiting = [
        name
        for name in layers_needing_data_init(model)
        if name in facts.get("awaiting_data", [])
        or not all(f"{name}.{part}" in fits for part, _ in model.get_submodule(name).named_parameters())
    ]
    model.load_state_dict({name: found[name] for name in own if name in fits}, strict=False)
    mark_needing_data_init(model, waiting)
    left = [
        f"{name} ({tuple(own[name].shape)}, there {tuple(found[name].shape)})"
        if name in found and found[name].shape != own[name].shape
        else name
        for name in own
        if name not in fits
    ]
    return StartingPoint(
        path=facts["path"],
        step=facts.get("step"),
        taken=tuple(name for name in own if name in fits),
        left=tuple(left),
        unused=tuple(name for name in found if name not in own),
        weights=facts["weights"],
    )
