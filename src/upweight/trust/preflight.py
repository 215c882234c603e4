"""What the rows themselves say against training on them, before step 1.

An examination is a pure function of one set: it gives what it measured, and a finding where that
is too much. The page of a code says whether it warns or refuses.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from upweight.config import Preflight
from upweight.data.account import Account
from upweight.stats import Interval, accuracy_interval
from upweight.trust.codes import page
from upweight.trust.finding import Finding, Refused
from upweight.trust.near import near_copies, nearly_same
from upweight.trust.words import Compared, count_words
from upweight.types import Preference, RowId, Tree

Ids = tuple[int, ...]

Figures = dict[str, Interval]
"""What was measured, by the names of FIGURES; the bounds of a plain count are its value."""


@dataclass(frozen=True)
class Examined:
    """One set, and from when on a suspicion is reported. `copies` names for a row the earlier one
    that it repeats."""

    name: str
    trees: Sequence[Tree]
    account: Account
    limits: Preflight
    copies: Mapping[RowId, RowId] = field(default_factory=dict[RowId, RowId])

    def preferences(self) -> Iterator[tuple[Tree, Preference]]:
        for tree in self.trees:
            for preference in tree.preferences:
                yield tree, preference

    def prompts(self) -> list[Ids]:
        """Of each preference: those of one prompt are not independent."""
        return [tree.prompt for tree, _ in self.preferences()]


@dataclass(frozen=True)
class Seen:
    """What was measured, and what is reported of it."""

    figures: Figures = field(default_factory=dict[str, Interval])
    finding: Finding | None = None


def examine(examined: Examined) -> tuple[Figures, list[Finding]]:
    """What the examinations measure, warn of and refuse, in the order of their codes."""
    return settle([examination(examined) for examination in EXAMINATIONS])


def settle(seen: Sequence[Seen]) -> tuple[Figures, list[Finding]]:
    figures = {name: value for one in seen for name, value in one.figures.items()}
    found = [one.finding for one in seen if one.finding is not None]
    return figures, [
        Refused(f.code, f.said, f.rows, f.metric) if page(f.code).severity == "refuses" else f
        for f in found
    ]


def _counted(name: str, num: float | int, of: int) -> Figures:
    share = num / max(1, of)
    return {name: Interval(share, share, share)}


def cut(examined: Examined) -> Seen:
    """So many responses lost their end, or did not fit, that what is learned is length; or so many
    prompts lost their beginning that it is an answer to something else."""
    account, limit = examined.account, examined.limits.cut
    answers = account.responses + sum(account.left_out.values())
    counts = {
        "chosen responses cut": (account.truncated["chosen"], account.preferences),
        "rejected responses cut": (account.truncated["rejected"], account.preferences),
        "responses cut": (account.truncated["response"], account.responses),
        "prompts cut": (account.truncated["prompt"], account.used),
        "responses left out as too long": (account.left_out.get("too_long", 0), answers),
        "rows dropped as too long": (account.dropped.get("too_long", 0), account.read),
    }
    shares = {what: num / max(1, of) for what, (num, of) in counts.items()}
    figures = _counted("cut", max(shares.values()), 1)
    high = {what: share for what, share in shares.items() if share > limit}
    if len(high.keys() & {"chosen responses cut", "rejected responses cut"}) == 2:
        high.pop("responses cut", None)  # it is what lies between the two
    if not high:
        return Seen(figures)
    said = ", ".join(f"{share:.0%} of {what}" for what, share in high.items())
    said = f"{examined.name}: {said} (preflight.cut is {limit:.0%})."
    return Seen(figures, Finding("UW205", said))


def unfinished(examined: Examined) -> list[Finding]:
    """So many responses whose rows say that they were cut off that little is learned of ending."""
    account, limit = examined.account, examined.limits.cut
    if not account.unfinished > limit * account.responses:
        return []
    said = (
        f"{examined.name}: {account.unfinished} of {account.responses} responses say that they did "
        "not stop (stopped: false), and have no stop token (preflight.cut is "
        f"{limit:.0%}): nobody learns from them where to end. Draw them with a larger "
        "max_new_tokens, or leave such rows out."
    )
    return [Finding("UW203", said)]


def identical(examined: Examined) -> Seen:
    """Rows that compare a response with itself: a conversion that went wrong, if there are many."""
    account, limit = examined.account, examined.limits.identical
    num = account.dropped.get("identical_responses", 0)
    figures = _counted("identical", num, account.read)
    if num <= limit * account.read:
        return Seen(figures)
    return Seen(
        figures,
        Finding(
            "UW206",
            f"{examined.name}: in {num} of {account.read} rows chosen and rejected are the same; "
            f"they are not used (preflight.identical is {limit:.0%}).",
            tuple(row for row, _ in account.examples["identical_responses"]),
        ),
    )


def empty(examined: Examined) -> Seen:
    """Responses without a word: a column that was left blank, or a model that failed."""
    account, limit = examined.account, examined.limits.empty
    rows, left = (d.get("empty_response", 0) for d in (account.dropped, account.left_out))
    answers = account.responses + sum(account.left_out.values())
    if rows <= limit * account.read and left <= limit * answers:
        return Seen()
    other = rows - sum(account.empty.values())
    sides = account.empty | ({"": other} if other else {})
    found = [
        f"{num} of {account.read} rows have an empty {side} response".replace("  ", " ")
        for side, num in sides.items()
    ]
    found += [f"{left} of {answers} responses are empty"] if left else []
    said = (
        f"{examined.name}: {' and '.join(found)}, without a word, and are not used "
        f"(preflight.empty is {limit:.0%})."
    )
    named = tuple(row for row, _ in account.examples.get("empty_response", []))
    return Seen({}, Finding("UW210", said, named))


def against_scores(examined: Examined) -> Seen:
    """Scores or a margin beside the pairs that say the rejected response is the better one."""
    account, limit = examined.account, examined.limits.contradictory
    if len(account.against) <= limit * account.rated:
        return Seen()
    said = (
        f"{examined.name}: in {len(account.against)} of {account.rated} pairs with scores of both "
        "responses or a margin beside them, these say that the rejected one is better "
        f"(preflight.contradictory is {limit:.0%}): chosen and rejected may be swapped."
    )
    return Seen({}, Finding("UW207", said, tuple(dict.fromkeys(account.against))[:5]))


def contradictory(examined: Examined) -> Seen:
    """Preferences of one prompt that go round in a circle, of two or of more."""
    by_prompt: dict[Ids, list[Tree]] = defaultdict(list)
    for tree in examined.trees:
        by_prompt[tree.prompt].append(tree)
    rows: list[str] = []
    total = 0
    for trees in by_prompt.values():
        edges = [
            (t.responses[p.chosen], t.responses[p.rejected], _row(t, p.chosen))
            for t in trees
            for p in t.preferences
        ]
        total += len(edges)
        rows += [edges[i][2] for i in sorted(_in_circles([edge[:2] for edge in edges]))]
    limit, figures = examined.limits.contradictory, _counted("contradictory", len(rows), total)
    if not rows or len(rows) <= limit * total:
        return Seen(figures)
    return Seen(
        figures,
        Finding(
            "UW210",
            f"{examined.name}: {len(rows)} of {total} preferences contradict each other: the same "
            f"responses in both orders, or in a circle (preflight.contradictory is {limit:.0%}).",
            tuple(dict.fromkeys(rows))[:6],
        ),
    )


def undecided(examined: Examined) -> Seen:
    """Labels that are as likely the other way round: their loss is least at a margin of 0."""
    pairs = list(examined.preferences())
    rows = [_row(tree, p.chosen) for tree, p in pairs if p.probability == 0.5]
    limit = examined.limits.contradictory
    if not rows or len(rows) <= limit * len(pairs):
        return Seen()
    said = (
        f"{examined.name}: {len(rows)} of {len(pairs)} preferences have a probability of 0.5: they "
        "say nothing about which response is better, and teach to tell none apart "
        f"(preflight.contradictory is {limit:.0%})."
    )
    return Seen({}, Finding("UW210", said, tuple(dict.fromkeys(rows))[:5]))


def _in_circles(edges: Sequence[tuple[Ids, Ids]]) -> set[int]:
    """The edges that stay when those that begin where none ends, or end where none begins, are
    taken away until there is none: they lie on circles, or between two."""
    touching: dict[Ids, list[int]] = defaultdict(list)
    for i, edge in enumerate(edges):
        for end in edge:
            touching[end].append(i)
    num_out, num_in = (Counter(edge[side] for edge in edges) for side in (0, 1))
    left = set(range(len(edges)))
    loose = [end for end in touching if not num_out[end] or not num_in[end]]
    while loose:
        for i in left.intersection(touching[loose.pop()]):
            left.remove(i)
            for end, num in zip(edges[i], (num_out, num_in), strict=True):
                num[end] -= 1
                if not num[end]:
                    loose.append(end)
    return left


def repeated(examined: Examined) -> Seen:
    """Rows that say what an earlier row said, or nearly, weigh twice."""
    limits, num = examined.limits, len(examined.trees)
    used = {tree.ids[0].row for tree in examined.trees}
    found = {late: early for late, early in examined.copies.items() if late in used}
    found |= near_copies(examined.trees, limits.edits)
    figures = _counted("repeated", len(found), num)
    if len(found) <= limits.repeated * num:
        return Seen(figures)
    pairs = [f"{late} (as {early})" for late, early in found.items()]
    return Seen(
        figures,
        Finding(
            "UW210",
            f"{examined.name}: {len(found)} of {num} rows repeat an earlier one, or "
            f"nearly, and weigh again (preflight.repeated is {limits.repeated:.0%}).",
            tuple(pairs[:5]),
        ),
    )


def similar(examined: Examined) -> Seen:
    """The responses of a preference differ in next to nothing: the gradients of the two nearly
    cancel, and what is left of them can lower both (UW304)."""
    limits = examined.limits
    pairs = list(examined.preferences())
    rows = [
        _row(tree, p.chosen)
        for tree, p in pairs
        if nearly_same(tree.responses[p.chosen], tree.responses[p.rejected], limits.edits)
    ]
    figures = _counted("similar", len(rows), len(pairs))
    if len(rows) <= limits.similar * len(pairs):
        return Seen(figures)
    return Seen(
        figures,
        Finding(
            "UW210",
            f"{examined.name}: in {len(rows)} of {len(pairs)} preferences the responses differ in "
            f"at most {limits.edits:.0%} of their tokens (preflight.similar is "
            f"{limits.similar:.0%}).",
            tuple(dict.fromkeys(rows))[:5],
        ),
    )


def longer(examined: Examined) -> Interval | None:
    """How often the longer response is the chosen one."""
    margins = [
        len(tree.responses[p.chosen]) - len(tree.responses[p.rejected])
        for tree, p in examined.preferences()
    ]
    return accuracy_interval(margins, examined.prompts()) if margins else None


def shortcuts(examined: Examined) -> Seen:
    """Rules that know no prompt and are nearly always right: taking the longer response, or the
    shorter one, and a naive Bayes classifier over tokens, asked about prompts that it has not
    counted."""
    figures: Figures = {}
    rules: list[tuple[str, Interval]] = []
    if (measured := longer(examined)) is not None:
        figures["longer"] = measured
        found, which = measured, "longer"
        if measured.value < 0.5:
            found = Interval(*(1 - x for x in (found.value, found.high, found.low)))
            which = "shorter"
        rules.append((f"the {which} response is the chosen one", found))
    compared = [
        Compared(tree.prompt, tree.responses[p.chosen], tree.responses[p.rejected])
        for tree, p in examined.preferences()
    ]
    if (words := count_words(compared)) is not None:
        found = accuracy_interval(words.margins(compared).tolist(), examined.prompts())
        figures["words"] = found
        rules.append(("a count of words that knows no prompt finds the chosen one", found))
    limit = examined.limits.shortcut
    solved = [
        f"{rule} in {found.value:.0%} of preferences [{found.low:.0%}, {found.high:.0%}]"
        for rule, found in rules
        if found.low > limit
    ]
    if not solved:
        return Seen(figures)
    said = (
        f"{examined.name}: {', and '.join(solved)} (preflight.shortcut is {limit:.0%}): accuracy "
        "will not show that more than that was learned."
    )
    return Seen(figures, Finding("UW211", said))


@dataclass(frozen=True)
class Reach:
    """How far a plan can move a weight: `total`, of which clipping and epsilon have left the share
    `held`."""

    total_steps: int
    learning_rate: float
    total: float
    held: float = 1.0


def hardly_moves(reach: Reach, limit: float, *, adapted: bool = False) -> list[Finding]:
    """A plan whose learning rates are so small, or so few, that no weight gets anywhere.

    AdamW moves a weight by about its learning rate at most, whatever the gradient's size: the mean
    of gradients is divided by the root of their mean square. So no weight moves by more than about
    the sum of the rates, which is the reach of the plan. Weights are hundredths in size. Epsilon
    is added to that root: where it is larger than what gradients are clipped to, less is left.
    """
    if reach.total >= limit:
        return []
    steps = "1 step" if reach.total_steps == 1 else f"{reach.total_steps:,} steps"
    said = (
        f"the whole run, {steps} at learning rates of {reach.learning_rate:.3g} at most, can move "
        f"a weight by about {reach.total:.2g} (preflight.reach is {limit:g}): the model will "
        "answer as the one that it begins with. "
    )
    if reach.held < 0.5:
        said += (
            f"optimizer.epsilon beside optimizer.max_grad_norm leaves {reach.held:.2g} of each "
            "update: lower the one or raise the other."
        )
    elif adapted:
        said += "Raise epochs or optimizer.learning_rate."
    else:
        said += (
            "Raise epochs or optimizer.learning_rate, or train with lora: true, whose rates are "
            "higher."
        )
    return [Finding("UW103", said)]


EXAMINATIONS: tuple[Callable[[Examined], Seen], ...] = (
    cut,
    identical,
    empty,
    against_scores,
    contradictory,
    undecided,
    repeated,
    similar,
    shortcuts,
)


def _row(tree: Tree, response: int) -> str:
    return str(tree.ids[response].row)
