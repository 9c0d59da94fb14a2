"""Lazy evaluation, shared by the classes of :mod:`nvae_fast.distributions`: a value is computed on first use."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Lazy:
    """Values computed on first use from raw tensors that must not change in between."""

    def _keep(self, **raw: torch.Tensor) -> None:
        self._raw = raw
        self._known: dict[str, torch.Tensor] = {}
        self._known_versions: dict[str, int | None] = {}
        self._given: dict[str, torch.Tensor] = {}
        self._versions = self._current_versions()

    def _current_versions(self) -> tuple[int, ...] | None:
        versions = [_version(t) for t in self._raw.values()]
        return None if None in versions else tuple(versions)  # type: ignore[arg-type]

    def _check_unchanged(self) -> None:
        now = self._current_versions()
        if self._versions is None or now is None:
            return
        for name, before, after in zip(self._raw, self._versions, now, strict=True):
            if before != after:
                raise RuntimeError(
                    f"{type(self).__name__}: {name} must stay as it was when the distribution was made (values are computed on "
                    "first use), got a tensor modified in place since; pass a clone"
                )

    def _get(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The value ``name``, kept for the next use. A value from a ``no_grad`` block has no graph and one from inference mode
        may not enter one: where a graph is wanted they are computed again."""
        given = self._changed(name)
        if given is not None:
            return given
        known = self._known.get(name)
        if known is not None:
            wants_graph = torch.is_grad_enabled() and any(t.requires_grad for t in self._raw.values())
            usable = (
                torch.compiler.is_compiling()  # cannot trace is_inference()
                or not known.is_inference()
                or torch.is_inference_mode_enabled()
            )
            if usable and (known.requires_grad or not wants_graph):
                return known
        self._check_unchanged()
        value = self._known[name] = compute()
        self._known_versions[name] = _version(value)
        return value

    def _changed(self, name: str) -> torch.Tensor | None:
        """The value ``name`` where it was set, or where the one that :meth:`_get` returned was modified in place; else None."""
        before, known = self._known_versions.get(name), self._known.get(name)
        if name not in self._given and before is not None and known is not None:
            now = _version(known)
            if now is not None and now != before:
                self._given[name] = known
        return self._given.get(name)


def _version(t: torch.Tensor) -> int | None:
    """How often ``t`` was modified in place. Inference tensors do not count it, and a compiler cannot trace it."""
    return None if torch.compiler.is_compiling() or t.is_inference() else t._version
