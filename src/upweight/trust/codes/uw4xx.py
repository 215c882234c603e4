"""UW4xx: what was trained is not what is served."""

from __future__ import annotations

from upweight.trust.codes.page import Page

PAGES: tuple[Page, ...] = (
    Page(
        code="UW401",
        title="The exported model is not the trained one",
        severity="refuses",
        meaning=(
            "A part of the model was not saved, or merging the adapter changed it. The metrics "
            "are those of the model in memory, and what is used afterwards is another."
        ),
        found_by=(
            "score the export on the evaluation rows: `upweight score --model RUN/model --data "
            "FILE --out scores.jsonl`, with the run's `compute.dtype`. `logp_chosen` and "
            "`logp_rejected` must agree, up to rounding, with the rows of `ledger.parquet` that "
            "have the last `step` and the same `row`."
        ),
        guarded_by=(
            "Each folder of the export appears whole or not at all. An adapter is merged into its "
            "base in float32."
        ),
        causes=(
            "Without `export.merge`, `model/` is an adapter: it needs its base model, which was "
            "moved, changed or cleared from the cache.",
            "The base model was updated on the hub after training.",
            "The export was converted to a smaller dtype or quantized (UW104).",
        ),
        do=(
            "Set `export.merge=true` to write a whole model, with the adapter beside it.",
            "Score again after each conversion, before the model is served.",
        ),
    ),
    Page(
        code="UW402",
        title="Serving renders other tokens than training",
        severity="refuses",
        meaning=(
            "The policy was trained on prompts as this tokenizer and template write them. A server "
            "that writes a conversation differently asks the model about prompts it never saw, "
            "and part of what was learned does not show."
        ),
        found_by=(
            "run `upweight check run.yaml`: it prints the first prompts with their special "
            "tokens. Give the server the same messages, ask it for the token ids of the prompt "
            "(many servers have a tokenize endpoint), and compare the text of those ids."
        ),
        guarded_by=(
            "The tokenizer and its chat template are written into `model/`. A prompt is rendered "
            "as serving does, with a generation prompt, and nothing after the stop token is "
            "scored."
        ),
        causes=(
            "The server uses a template of its own, or none.",
            "`data.template` was none, and the server uses the chat template; or the other way "
            "round.",
            "`data.template_options` of the run are not set on the server.",
            "The server adds beginning-of-text to a template that writes it already, or a system "
            "message of its own.",
        ),
        do=(
            "Serve from `model/`, with its own tokenizer and template.",
            "Pass the run's `data.template_options` with each request.",
            "Train with the system message that you serve with.",
        ),
    ),
)
