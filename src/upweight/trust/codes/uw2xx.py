"""UW201 to UW206: the tokens of the rows are not what they are taken for."""

from __future__ import annotations

from upweight.trust.codes.page import Page

PAGES: tuple[Page, ...] = (
    Page(
        code="UW201",
        title="Other tokens are scored than the response and its stop",
        severity="refuses",
        warns_of="few rows, and of what is a guess",
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
            "refused above `preflight.spans`: a word of an answer, a tool call, or what the scored "
            "message says apart that it thought (its reasoning or thinking). "
            "So many rows whose responses all begin with the whole prompt are reported only: the "
            "task may be to repeat it. Reported, too, are "
            "texts without a prompt where other rows of their file have one, and texts whose "
            "prompt is what chosen and rejected begin with alike, where a chat template makes a "
            "user's turn of it; `shared_prompts` and `unprompted` in `account.json` count them."
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
        detectors=(
            "upweight.data.account:require_used",
            "upweight.trust.spans:prompts_taken",
            "upweight.trust.spans:scored",
        ),
    ),
    Page(
        code="UW202",
        title="The prompt's tokens are not its row's, or not how it begins with its response",
        severity="refuses",
        warns_of="few rows, and of prompts that end in an answer",
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
        warns_of="a stop token that the model does not know, and of many responses that were cut",
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
            "generation does not stop, a stop that had to be appended because the chat template "
            "closes answers with a text that is no token, and more responses than `preflight.cut` "
            "whose rows say that they did not stop (`stopped` is false). `appended_stop` and "
            "`unfinished` in `account.json` count what was appended, and what was not."
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
        detectors=(
            "upweight.data.account:require_used",
            "upweight.trust.spans:stops",
            "upweight.trust.preflight:unfinished",
        ),
    ),
    Page(
        code="UW204",
        title="Beginning-of-text is doubled, or a text was rendered before",
        severity="refuses",
        warns_of="few rows, and of what other templates write",
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
)
