"""Whether what an adapter has learned can be written into its model, and what is to be said."""

from __future__ import annotations

from typing import Any

from tta.core.checks import shown

__all__ = ["check_keep"]


def check_keep(adapter: Any, keep: Any) -> None:
    """Refuse what a plain model cannot hold, before anything changes, and warn of what is lost.

    Args:
        adapter: A :class:`tta.Adapter`.
        keep: As for its ``unwrap``.

    Raises:
        ValueError: When ``keep`` is no such value, or is True and a rule cannot be written.
    """
    if not isinstance(keep, bool) and not (isinstance(keep, str) and keep == "parameters"):
        raise ValueError(
            f'`keep` must be False, True or "parameters", got {shown(keep)}: pass one of these.'
        )
    if not keep:
        return
    label, rules = adapter.config.label, list(adapter.norm_layers.values())
    if keep is True:
        _check_writable(adapter, rules)
    elif rules or adapter.output is not None or adapter.input is not None:
        adapter.session.warn_once(
            "parameters",
            f"the parameters were learned under {label}, and go with the source "
            "statistics and plain logits from now on: compare the results.",
        )
    if any(key.startswith("update/teacher.") for key in adapter._state.tensors()):
        adapter.session.warn_once(
            "teacher",
            f"the model gets the student's parameters, but {label} answers with its teacher's, "
            "which state() has under 'update/teacher.': compare the results.",
        )


def _check_writable(adapter: Any, rules: list[Any]) -> None:
    for part in (*(wrapper.rule for wrapper in rules[:1]), adapter.output, adapter.input):
        if part is not None and not part.writable:
            raise ValueError(
                f"`keep` must be False for {part.name}, which a plain model cannot hold, got "
                "True: wrap with norm='robust_bn' or without an output or input rule, or pass "
                "keep='parameters'."
            )
    update = adapter.update
    if update is not None and not (update.trains_model or update.writable):
        raise ValueError(
            f"`keep` must be False for {update.name}, which learns nothing that a plain "
            "model can hold, got True: tta.save the adapter, or wrap with output='foa_shift'."
        )
