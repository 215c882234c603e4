"""UW2xx: the rows or their tokens are not what they are taken for."""

from __future__ import annotations

from upweight.trust.codes.page import Page

PAGES: tuple[Page, ...] = (
    Page(
        code="UW201",
        title="Other tokens are scored than the response and its stop",
        severity="refuses",
        meaning=(
            "A response's log-prob must be the sum over its own tokens and one stop token. With "
            "tokens of the prompt in the sum, the reward is about the prompt; with the first or "
            "last token missing, the model is not taught how to begin or when to stop."
        ),
        found_by=(
            "Before step 1, in every set: each scored span is decoded and compared with the row's "
            "text; up to 100 rows where it is not plainly the same, and up to 100 of the others, "
            "are tokenized again as one text. One row in which other tokens are scored is refused. "
            "Responses that hold a turn which is not the assistant's (a user's, a tool's result) "
            "are not used and are counted as `other_turns_in_response`; a share of rows or of "
            "responses above `preflight.spans` is refused. "
            "Rows of which the chat template or the tokenizer leaves out text are reported, and "
            "refused above `preflight.spans`. So many rows whose responses all begin with the "
            "whole prompt are reported only: the task may be to repeat it."
        ),
        guarded_by=(
            "Scored tokens are given by where each response lies, not by a mask value. Batches "
            "have no padding that could be scored. A response's first token is predicted at the "
            "prompt's last token, whatever lies between the two in the batch."
        ),
        causes=(
            "Prompt and response come apart elsewhere than you think: the column `prompt` is "
            "missing, and what both responses share was taken as the prompt.",
            "The response repeats the prompt as text.",
            "Chosen and rejected are whole conversations that differ in an early answer: all that "
            "follows would be the response.",
            "The chat template takes thoughts out of an answer, or does not write its tool calls, "
            "which then are not learned.",
            "A bug in upweight.",
        ),
        do=(
            "Give `prompt` as a column of its own, and responses without it.",
            "Of whole conversations give as `prompt` the messages up to the last user turn that "
            "both share, and one answer each; for sft the conversation in the column messages, "
            "with `data.turns=all`.",
            "Run `upweight check run.yaml` and read the first rows: what is scored stands between "
            "the bars.",
            "Compare `tokens_chosen` and `tokens_rejected` in the lines of `upweight score` with "
            "your own count.",
        ),
        detectors=("upweight.data.account:require_used", "upweight.trust.spans:scored"),
    ),
    Page(
        code="UW202",
        title="The prompt's tokens are not its row's, or not how it begins with its response",
        severity="refuses",
        meaning=(
            "Serving gives the model the tokens of the prompt alone. If tokenizing prompt and "
            "response as one text gives other tokens at their boundary, or the chat template "
            "writes another prompt when a response follows, training scores a continuation of a "
            "prompt that serving never shows. And what the template does not write at all, such as "
            "tools, tool calls or a system message that it does not know, the model never sees."
        ),
        found_by=(
            "Before step 1, in every set: the share of rows and of responses that were left out as "
            "`boundary`. More than `preflight.spans` is refused. Up to 200 rows are also tokenized "
            "again, by the tokenizer's own chat template: one whose prompt then has other tokens, "
            "alone or with a response, is refused. In the same rows the letters of every turn of "
            "the prompt must be in what the template writes (but for the thoughts of the "
            "assistant's turns), the names of the tools too, and it must write something else "
            "without the tools or a tool call; rows of which it leaves out any of this are "
            "reported, and refused above `preflight.spans` (a response's tool calls: UW201). "
            "Reported above `preflight.spans` as well: prompts that end in a turn of the "
            "assistant's, which the responses do not go on with. "
            "`examples` in `account.json` has the first five "
            "rows of each reason, with the tokens; `boundary_repaired` counts the rows whose "
            "prompt gave white space to the responses."
        ),
        guarded_by=(
            "Each prompt is tokenized alone and with each of its responses. Where the two differ "
            "by no more than white space, the prompt ends at the last token that all have. Where "
            "they differ by more, the response is not used and is counted."
        ),
        causes=(
            "The chat template writes something at the end of a bare prompt that it leaves out "
            "before an answer, such as the beginning of a thought.",
            "In plain text, the response begins inside a word or number that the prompt began.",
            "The chat template does not read tools or tool calls, skips a role, or cuts texts.",
        ),
        do=(
            "Set the template's own variables in `data.template_options`, such as enable_thinking.",
            "In plain text, end prompts without white space and begin responses with it.",
            "Take a model whose chat template writes what the rows have, or write it into the "
            "texts yourself: a system message before the question, say.",
        ),
        detectors=(
            "upweight.data.account:require_used",
            "upweight.trust.spans:answered_before",
            "upweight.trust.spans:boundary",
        ),
    ),
    Page(
        code="UW203",
        title="The stop token is missing, doubled or not scored",
        severity="refuses",
        meaning=(
            "A model that never sees its stop token scored learns nothing about ending, and "
            "training shifts its length by chance. A second stop token adds a term to every "
            "reward that is about nothing."
        ),
        found_by=(
            "Before step 1, in every set: the stop tokens in each scored span are counted. One "
            "span in which there is not exactly one, at its end, or none where it was cut, is "
            "refused; so are rows or responses left out as `stop_in_response` above "
            "`preflight.spans`. Reported are responses that end in a token at which the model's "
            "generation does not stop, and a stop that had to be appended because the chat "
            "template closes answers with a text that is no token. `appended_stop` in "
            "`account.json` counts all that were appended."
        ),
        guarded_by=(
            "A response is cut after the first stop token behind its content, and gets one where "
            "the template writes none. One that has a special token inside, as text or once it is "
            "tokenized, is left out as `stop_in_response`. Only `data.truncation` response makes "
            "responses without a stop; `truncated` counts them. Padding is never recognized by its "
            "id, so it does no harm if the padding token is the stop token."
        ),
        causes=(
            "`eos_token` in tokenizer_config.json is the base model's, and the chat template ends "
            "turns with another token.",
            "The texts of the rows contain special tokens.",
            "`eos_token_id` in generation_config.json names an ordinary token, such as a line "
            "break, or not the token that the chat template ends answers with.",
            "`data.truncation` is response, and most responses are longer than `data.max_length`.",
        ),
        do=(
            "Correct `eos_token` in tokenizer_config.json or `eos_token_id` in "
            "generation_config.json of the model.",
            "Remove special tokens from the texts of the rows.",
            "Set `data.truncation=drop`, or raise `data.max_length`.",
        ),
        detectors=("upweight.data.account:require_used", "upweight.trust.spans:stops"),
    ),
    Page(
        code="UW204",
        title="Beginning-of-text is doubled, or a text was rendered before",
        severity="refuses",
        meaning=(
            "Models are trained with one beginning-of-text token, at the first position. A second "
            "one moves every log-prob, in policy and reference alike, and training then fits "
            "prompts that serving does not send."
        ),
        found_by=(
            "Before step 1, in every set: the beginning-of-text tokens of each row are counted, "
            "and those subtracted that the chat template writes around an empty conversation of "
            "the same turns, for some templates begin each turn with one. Rows with more are "
            "reported, and refused above `preflight.spans`. So are rows whose prompts hold a "
            "special token that the chat template writes, above `preflight.spans`: they were "
            "rendered before; with another special token they are reported. Reported too, above "
            "`preflight.markers`: rows that hold what other templates write and this tokenizer "
            "reads as text, such as [INST], </s> or \\n\\nHuman:. "
            "`special_in_prompt` in `account.json` "
            "counts the rows that contain any special token's text before the template adds one."
        ),
        guarded_by=(
            "Of two beginning-of-text tokens at the start of a prompt one is removed. A response "
            "that has the text of a special token inside is left out as `stop_in_response`."
        ),
        causes=(
            "The rows were rendered with a chat template already, and are rendered again.",
            "Texts that happen to contain it, such as the HTML tag <s>.",
        ),
        do=(
            "Give the conversation as messages, without special tokens.",
            "For text that is rendered already, set `data.template=none`.",
        ),
        detectors=(
            "upweight.trust.spans:_marked",
            "upweight.trust.spans:beginnings",
            "upweight.trust.spans:rendered_before",
        ),
    ),
    Page(
        code="UW205",
        title="Truncation changes what is compared",
        severity="refuses",
        meaning=(
            "If one side of the preferences is longer, cutting or dropping falls on that side, "
            "and the data that remain prefer something else. A response that is cut has no stop "
            "token, and a prompt that is cut may have lost its question."
        ),
        found_by=(
            "Before step 1, in every set: the share of preferences whose chosen, or rejected, "
            "response was cut, of responses and of prompts that were cut, and of responses and "
            "rows left out as too long. One of them above `preflight.cut` is refused. "
            "`truncated`, `dropped` and `lengths` in `account.json` have the counts."
        ),
        guarded_by=(
            "Nothing is cut unless `data.truncation` asks for it; a row that is too long is "
            "dropped and counted. One token of the prompt and of each response always stays. "
            "The report says when more than 5 % of the training rows were not used."
        ),
        causes=(
            "`data.max_length` is much smaller than the rows.",
            "The model's own limit is smaller than the rows.",
            "One source of the data writes far longer answers than the other.",
        ),
        do=(
            "Raise `data.max_length`, up to the model's limit.",
            "Keep `data.truncation=drop` unless prompts are what is long; then use "
            "`data.truncation=prompt`, which cuts prompts at their beginning, and set "
            "`preflight.cut` to the share that may lose it.",
            "Balance the lengths in the data, and look at UW211.",
        ),
        detectors=("upweight.trust.preflight:cut",),
    ),
    Page(
        code="UW206",
        title="Chosen and rejected are the same",
        severity="warns",
        meaning=(
            "Two equal responses make a margin of 0 whatever the policy does. Their pair has a "
            "loss of ln 2 and no gradient, and accuracy counts it as half right."
        ),
        found_by=(
            "Before step 1, in every set: the share of rows that are dropped because chosen and "
            "rejected are the same tokens, before or after cutting. More than "
            "`preflight.identical` is reported, with rows. `identical_responses` under `dropped` "
            "and `left_out` in `account.json` has the counts."
        ),
        guarded_by=(
            "Responses that are equal as text, or as tokens after cutting, are one response. A "
            "row in which no preference remains is dropped as `identical_responses`."
        ),
        causes=(
            "Two samples of one model at a low temperature.",
            "`data.truncation` is response, and the two differ only behind the cut.",
            "A conversion that wrote one column into both.",
        ),
        do=(
            "Read the rows that `examples` in `account.json` names.",
            "Sample with a higher temperature, or sample more responses per prompt.",
            "Raise `data.max_length`.",
        ),
        detectors=("upweight.trust.preflight:identical",),
    ),
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
            "chosen_score, chosen-rating and the like) or a negative margin are reported where a "
            "share above `preflight.contradictory` says that the rejected response is better. "
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
        meaning=(
            "A run on a fraction of the data looks like a run on all of it. If what is missing is "
            "not random, such as all long rows, the model learns from a biased rest."
        ),
        found_by=(
            "Before step 1, in every set: the rows that were read must be those that became tokens "
            "and those dropped for a reason, or the run is refused. Compare `read` in "
            "`account.json` with the number of rows in your files. `left_out` counts responses of "
            "used rows that are in no preference, and `unused_columns` columns that nothing reads."
        ),
        guarded_by=(
            "Every row that is read is used or dropped for a reason that is counted. The first "
            "five rows of each reason are kept with a sentence."
        ),
        causes=(
            "`data.limit` is set: rows beyond it are not read.",
            "A file is missing from `data.path`.",
            "Rows were lost before, when the file was written.",
            "A bug in upweight, if it is refused.",
        ),
        do=(
            "Run `upweight check run.yaml` and read its account line.",
            "Remove `data.limit`.",
        ),
        detectors=("upweight.trust.spans:accounted",),
    ),
    Page(
        code="UW209",
        title="A prompt is in training and in evaluation",
        severity="refuses",
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
            "upweight.recipes.prepare:_nearly_apart",
            "upweight.recipes.prepare:_require_apart",
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
        detectors=("upweight.trust.preflight:_shortcut",),
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
