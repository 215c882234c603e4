"""UW207 to UW212: what the rows say is not what they are meant to say."""

from __future__ import annotations

from upweight.trust.codes.page import Page

PAGES: tuple[Page, ...] = (
    Page(
        code="UW207",
        title="Chosen and rejected are swapped",
        severity="warns",
        meaning=(
            "The policy learns to do what people rejected. The loss falls and accuracy rises as in "
            "a good run, because both are measured on the same swapped labels."
        ),
        found_by=(
            "Before step 1, in every set: in what share of preferences the reference gives the "
            "chosen response the higher log-prob per token, and in what share the longer response "
            "is the chosen one, which is what people and judges mostly take. Below "
            "`preflight.swapped` by its whole interval is reported, with the five rows that speak "
            "most for it; the share by length only where the reference does not agree with the "
            "labels more often than not. Read them: a model that prefers what people reject is "
            "also why one collects preferences. `upweight check` asks the reference about a few "
            "rows of each set, training about all. For a reward model the lengths alone are asked. "
            "Scores of both responses that stand beside a pair (score_chosen and score_rejected, "
            "chosen_score, chosen-rating and the like), scores of responses whose row states its "
            "preferences too, or a negative margin are reported where a share above "
            "`preflight.contradictory` says that the rejected response is better. "
            "Flips do not show where the reference itself does not agree with right labels, as a "
            "small model on answers that people checked: then swapped columns look as likely to "
            "it as right ones, and neither its share nor the lengths may be far below one half."
        ),
        guarded_by=(
            "The report says so when a held-out accuracy is below chance by its whole interval. "
            "That finds an evaluation set that is swapped against the training set, and no data "
            "that are swapped throughout."
        ),
        causes=(
            "Columns were swapped when the data were converted.",
            "Scores are ranks, where 1 is the best: here a higher score is the better one.",
            "A label such as winner: 1 counts from 0 in one place and from 1 in another.",
        ),
        do=(
            "Swap the columns, or negate the scores, in the data.",
            "Keep twenty rows that you have read yourself as a set under `evaluation.sets`.",
        ),
        detectors=(
            "upweight.trust.likely:_swapped",
            "upweight.trust.preflight:against_scores",
        ),
    ),
    Page(
        code="UW208",
        title="Rows disappear without a word",
        severity="refuses",
        warns_of="rows of which most prefer no response",
        meaning=(
            "A run on a fraction of the data looks like a run on all of it. If what is missing is "
            "not random, such as all long rows, the model learns from a biased rest."
        ),
        found_by=(
            "Before step 1, in every set: the rows that were read must be those that became tokens "
            "and those dropped for a reason, or the run is refused. So is one that drops more "
            "than `preflight.dropped` of them, all reasons together but for those that are "
            "reported under another code (too long UW205, equal UW206, without a word UW210, "
            "responses that hold a stop token or do not come apart UW201 to UW203) or of which "
            "their own key permits more. Rows that prefer no response, such as those whose "
            "scores are equal, count only for a warning, where more than half of the rows are "
            "not used. Compare `read` in "
            "`account.json` with the number of rows in your files. `left_out` counts responses of "
            "used rows that are in no preference, and `unused_columns` columns that nothing reads."
        ),
        guarded_by=(
            "Every row that is read is used or dropped for a reason that is counted. The first "
            "five rows of each reason are kept with a sentence."
        ),
        causes=(
            "The chat template refuses the conversations: a system turn that it does not know, or "
            "turns that do not alternate.",
            "A column has another name than in the other rows, or is empty in some.",
            "`data.limit` is set: rows beyond it are not read.",
            "A file is missing from `data.path`.",
            "Rows were lost before, when the file was written.",
            "A bug in upweight, if it is refused.",
        ),
        do=(
            "Run `upweight check run.yaml` and read its account line: it has the number of each "
            "reason, and `examples` in `account.json` rows.",
            "Mend the rows, or remove them yourself and know what is left; only then raise "
            "`preflight.dropped`.",
            "Remove `data.limit`.",
        ),
        detectors=(
            "upweight.trust.unused:_many",
            "upweight.trust.unused:accounted",
        ),
    ),
    Page(
        code="UW209",
        title="A prompt is in training and in evaluation",
        severity="refuses",
        warns_of="prompts that are nearly the same",
        meaning=(
            "Accuracy on prompts that were trained on measures memory. It rises with every epoch "
            "and says nothing about new prompts."
        ),
        found_by=(
            "Every set of `evaluation.sets` is compared with the training rows by prompt. White "
            "space around the texts does not count, nor whether a prompt is text or one user "
            "turn. One shared prompt is enough to refuse; the message names a row of each side. "
            "Reported, with rows, for what `evaluation.fraction` holds out too: prompts that are "
            "the same but for case, white space, the punctuation around a text, or a system "
            "message. The same question in other words is not found."
        ),
        causes=(
            "The sets were split by row, and a prompt has several rows.",
            "The public test split of the data repeats prompts of its train split.",
            "The same file is in `data.path` and in `evaluation.sets`.",
        ),
        do=(
            "Use `evaluation.fraction`, which holds out whole prompts, in place of a set.",
            "Remove the shared prompts from one side.",
        ),
        detectors=(
            "upweight.recipes.apart:nearly_apart",
            "upweight.recipes.apart:require_apart",
        ),
    ),
    Page(
        code="UW210",
        title="Preferences contradict or repeat each other",
        severity="warns",
        meaning=(
            "Two rows that prefer opposite responses cancel. Preferences in a circle cannot all "
            "be learned. Repeated rows weigh as often as they occur. Of responses that differ in "
            "next to nothing the gradients nearly cancel, and what is left of them can lower both "
            "(UW304). In each case part of the loss cannot fall, or falls for another reason than "
            "the preference."
        ),
        found_by=(
            "Before step 1, in every set: the preferences of each prompt as arrows from the "
            "chosen to the rejected response. Those that lie on a circle, two opposite ones or "
            "more, or between two circles, are counted; a share above `preflight.contradictory` "
            "is reported, with rows. So is a share of rows above `preflight.repeated` that say "
            "what an earlier row says, but for case, white space and the punctuation around a "
            "text, or that give the same prompt nearly the same responses; and a share of "
            "preferences above `preflight.similar` whose own two responses are nearly the same. "
            "Nearly means that at most `preflight.edits` of the longer one's tokens have to be put "
            "in, left out or exchanged: a short answer that differs in one token never is. And "
            "rows, or responses, that are not used because a response has no word, above "
            "`preflight.empty`; and preferences whose probability is 0.5, which say nothing, "
            "above `preflight.contradictory`."
        ),
        guarded_by=(
            "Rows that repeat an earlier one exactly are counted, and used. Empty and equal "
            "responses are left out as `empty_response` and `identical_responses`."
        ),
        causes=(
            "Several annotators who disagree.",
            "Data sets were concatenated that share rows.",
            "Scores that differ by chance make preferences of responses that are equally good.",
            "One response was made from the other by changing a word.",
        ),
        do=(
            "Remove repeated rows, and settle contradictions by majority.",
            "Leave out preferences whose responses are nearly the same, or watch the chosen "
            "log-probs.",
            "Raise `data.min_score_gap`, so that close scores make no preference.",
            "Set `loss.label_smoothing` to the share of labels that you believe are flipped.",
        ),
        detectors=(
            "upweight.trust.preflight:contradictory",
            "upweight.trust.preflight:empty",
            "upweight.trust.preflight:repeated",
            "upweight.trust.preflight:similar",
            "upweight.trust.preflight:undecided",
        ),
        source="On responses that are alike: Pal et al. 2024 (arXiv:2402.13228)",
    ),
    Page(
        code="UW211",
        title="A shortcut solves the data",
        severity="warns",
        meaning=(
            "If a rule such as taking the longer response is right nearly as often as the policy, "
            "accuracy does not show that anything else was learned. The policy then tends to "
            "write long answers, not better ones."
        ),
        found_by=(
            "Before step 1, in every set: how often the longer response is the chosen one (or the "
            "shorter), and how often a count of words finds it that knows neither the prompt nor "
            "the rows it is asked about (naive Bayes, five folds of prompts). An accuracy above "
            "`preflight.shortcut` by its whole interval is reported. After training `report.html` "
            "holds the policy's held-out accuracy against the rule by length."
        ),
        guarded_by=(
            "The report says so when the length rule is better than chance and the policy is not "
            "shown to be better than the rule."
        ),
        causes=(
            "Annotators or a judge model favour long or formatted answers.",
            "Chosen and rejected come from two models with different habits.",
        ),
        do=(
            "Choose training rows so that chosen and rejected are equally long on average.",
            "Make both responses with the same model and the same instructions.",
            "Name a set of pairs of equal length under `evaluation.sets`.",
        ),
        source=(
            "Singhal et al. 2023 (arXiv:2310.03716); for DPO: Park et al. 2024 (arXiv:2403.19159)"
        ),
        detectors=("upweight.trust.preflight:shortcuts",),
    ),
    Page(
        code="UW212",
        title="Both responses are improbable under the reference",
        severity="warns",
        meaning=(
            "The data come from other models. The policy learns how to rank texts that it would "
            "never write, which need not change what it does write; and lowering an improbable "
            "response can move probability anywhere (UW304)."
        ),
        found_by=(
            "Before step 1, in every set: the reference's mean log-prob per token of the likelier "
            "response of each preference, against that of its own answers to 8 of the training "
            "prompts, sampled at temperature 1. Where the data lie more than "
            "`preflight.improbable` nats a token below, by both their intervals, it is reported "
            "with the least probable rows. Texts that people or other models wrote for the same "
            "purpose lie up to 1 nat below; `upweight check` prints both figures for yours, from "
            "a few rows."
        ),
        causes=(
            "The responses were written by people or by other models.",
            "`model` is a base model, and the data are conversations.",
            "The data's format differs from the model's chat template.",
        ),
        do=(
            "Fine-tune the model on the chosen responses first, and give the result as `model`.",
            "Sample responses from the model itself, score them, and train on those: `upweight "
            "sample --model START --prompts FILE --out samples.jsonl -n 4` writes the layout "
            "that training reads, once each response has a score.",
            "See that `data.template` is right for this model.",
        ),
        source="Tajwar et al. 2024 (arXiv:2404.14367)",
        detectors=("upweight.trust.likely:improbable",),
    ),
)
