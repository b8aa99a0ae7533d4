"""What a report says of times: those of a choice's plans and of what was not chosen, before a change and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tncompile.ir import Network, Term
from tncompile.passes.base import Change, Context
from tncompile.passes.choice import BatchPlans
from tncompile.passes.plans import DENSE, TRACED, Candidate, best_of, label_of


def explain(
    network: Network,
    before: Term,
    choice: BatchPlans,
    after: Sequence[Term],
    ways: Mapping[Candidate, Term],
    context: Context,
) -> Change:
    """The change that a choice is: `after` has the term as each of its plans computes it, `ways` the candidates with
    the term that each computes."""
    candidates = [*ways]
    what = "; ".join(f"{serves}{_what(before, term)}" for serves, term in zip(_serves(choice), after, strict=True))
    plan, batch = choice.plans[-1], context.batches[-1]
    others = [
        f"{name} {microseconds(other.times[-1])}"
        for name, other in ((label, best_of(candidates, label)) for label in (DENSE, TRACED))
        if other is not None and other.tree != plan.tree
    ]
    kind = "measured" if plan.measured else "predicted"
    why = f"{kind} {microseconds(plan.times[-1])} at batch {batch}; {', '.join(others)}" if others else ""
    ranked = sorted(candidates, key=lambda c: sum(c.times), reverse=True)  # of equal labels the best stays
    tried = {c.label or label_of(ways[c], c.tree): _rounded(c.seconds) for c in ranked}
    details: dict[str, object] = {"batches": context.batches, "microseconds": tried}
    if plan.measured:
        details["measured"] = {c.label or label_of(ways[c], c.tree): _rounded(c.measured) for c in ranked}
    chosen: dict[int, dict[str, float]] = {}
    for k, size in enumerate(context.batches):
        way = choice.plan_for(size)
        chosen[size] = {"predicted": _rounded(way.seconds)[k]}
        if way.measured:
            chosen[size]["measured"] = _rounded(way.measured)[k]
    details["chosen"] = chosen
    return Change(network.output.name, what, why, details=details)


def _serves(choice: BatchPlans) -> list[str]:
    if not choice.limits:
        return [""]
    return [*(f"up to batch {limit}: " for limit in choice.limits), "beyond: "]


def _what(before: Term, after: Term) -> str:
    if before.windows and not after.windows:
        return f"windows written out: order {label_of(after, after.order)}"
    merged = len(before.cores) - len(after.cores)
    if len(after.cores) == 1 and merged:
        return f"folded to dense: {len(before.cores)} cores are one"
    order = f"order {label_of(after, after.order)}"
    return f"{order}, {len(before.cores)} cores are {len(after.cores)}" if merged else order


def _rounded(seconds: Sequence[float]) -> list[float]:
    return [round(s * 1e6, 3) for s in seconds]


def instead(new: Sequence[float], old: Sequence[float], context: Context) -> str:
    """``12.3 µs instead of 45.6 µs at batch 32``: seconds at each batch size, of which the largest is shown."""
    return f"{microseconds(new[-1])} instead of {microseconds(old[-1])} at batch {context.batches[-1]}"


def microseconds(seconds: float) -> str:
    """``12.3 µs``, ``4.56 ms``, ``7.89 s``."""
    unit, factor = next(((u, f) for u, f in (("s", 1), ("ms", 1e3)) if seconds * f >= 1), ("µs", 1e6))
    return f"{seconds * factor:.3g} {unit}"
