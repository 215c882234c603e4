"""Do the weights learn, and against what?"""

from __future__ import annotations

from upweight.trust.finding import Finding
from upweight.trust.watch.seen import HEAD, VALUES, Record, Seen


def nothing_learns(seen: Seen, record: Record) -> Finding | None:
    """No weight, or none of some layers, has moved after the first step, whose learning rate is
    never 0; or weights have by their decay alone."""
    if seen.moved is None or seen.judged:
        return None
    if record.get("advantages/nonzero") == 0:
        # A first round whose answers all scored the same has no gradient, and the next may.
        seen.look_again()
        return None
    if seen.learns or (record["grad_norm"] != 0 and seen.moved > 0):
        seen.learns = True
        return _some_do_not(seen, record)
    if record["grad_norm"] == 0:
        cause = "every gradient is 0: no scored token depends on a weight that is trained"
    else:
        cause = (
            f"the updates of a learning rate of {record['learning_rate']:.3g} are smaller than "
            "what the weights can hold: raise optimizer.learning_rate"
        )
    moved = "no weight has moved" if seen.moved == 0 else "weights move by weight decay alone"
    return Finding("UW103", f"step {record['step']:.0f}: {moved}; {cause}.")


def _some_do_not(seen: Seen, record: Record) -> Finding | None:
    """Layers that stand still between others that move."""
    assert seen.moved is not None
    # Updates too small for most weights leave some layers where they are by chance: they are
    # looked at after the next steps too, which may be larger.
    if seen.still and seen.moved < seen.limits.moved:
        return None
    # Nothing reaches the layers below a value head, which starts as 0, before the step after it has
    # moved, little at first, and nothing while all values are clipped.
    heard = seen.looks > 1 and record.get("grad_norm/value", 0.0) > 0
    judged = heard and not _is_early(seen, record)
    # The head itself has nothing to learn of answers that earn just what it says, such as 0.
    wrong = record.get("value_loss", 0.0) > 0
    asked = {x: wrong if x == HEAD else judged or not x.startswith(VALUES) for x in seen.still}
    still = [x for x in seen.still if asked[x]]
    seen.judged = still == seen.still
    if not still:
        return None
    shown = ", ".join(still[:8]) + (", ..." if len(still) > 8 else "")
    return Finding(
        "UW103",
        f"step {record['step']:.0f}: nothing in {shown} has moved, though it is trained: no "
        "gradient arrives there. A forward pass that detaches, or a layer that nothing reads.",
    )


def nothing_is_taught(seen: Seen, record: Record) -> Finding | None:
    """No answer of the run ever earned more than another. Of a hard task the first rounds may earn
    nothing."""
    if seen.taught or _is_early(seen, record):
        return None
    same = "all answers" if "value_loss" in record else "all answers to a prompt"
    return Finding(
        "UW103",
        f"step {record['step']:.0f}: no answer so far earned more than those that it is compared "
        f"with: rollout.reward gives {same} the same (at last {record['reward']:.3g}). Look at "
        "rollouts, take another reward or easier prompts, or raise rollout.responses.",
    )


def _is_early(seen: Seen, record: Record) -> bool:
    """Whether the next steps may still show what these have not."""
    return record["step"] < seen.limits.patience and record["step"] != seen.told.total_steps


def swallowed(seen: Seen, record: Record) -> Finding | None:
    """Weights in half precision of which few have moved."""
    half = [p.dtype for p in seen.lm.model.parameters() if p.requires_grad and p.itemsize < 4]
    # AdamW's first step moves every element that has a gradient.
    if not half or seen.moved is None or not 0 < seen.moved < seen.limits.moved:
        return None
    return Finding(
        "UW104",
        f"step {record['step']:.0f}: {seen.moved:.0%} of the weights have moved (watch.moved is "
        f"{seen.limits.moved:.0%}): they are kept in {str(half[0]).removeprefix('torch.')}, which "
        "rounds small updates away. Keep them in float32.",
    )


def is_the_reference(seen: Seen, record: Record) -> Finding | None:
    """The policy's log-probs change and the margin stays exactly 0."""
    ratios = [record.get(f"logratios/{side}") for side in ("chosen", "rejected")]
    renewed = record.get("reference/renewed") == 1
    if record["step"] < 2 or not seen.moved or renewed or any(r != 0 for r in ratios):
        seen.own = None
        return None
    # Weights in fp32 move long before a forward pass in bf16 shows it, as in a long warmup: what
    # counts is that the policy says something else than it did, and the margin does not.
    if not seen.says_something_else():
        return None
    return Finding(
        "UW102",
        f"step {record['step']:.0f}: the policy's log-probs have changed, and are still exactly "
        "the reference's: the reference is the policy itself.",
    )


def same_order(seen: Seen, record: Record) -> Finding | None:
    """An epoch went through the rows as an earlier one did."""
    if seen.orders.repeated is None:
        return None
    epoch, earlier = seen.orders.repeated
    return Finding(
        "UW309",
        f"step {record['step']:.0f}: epoch {epoch} had its {seen.orders.num_rows} rows in the "
        f"order of epoch {earlier}: the same rows make a step each time, and the last ones weigh "
        "more. Draw each epoch's order from the seed and the epoch's number.",
        metric="loss",
    )
