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
            "Before a folder of the export appears, it is read back from disk with plain "
            "transformers, an adapter on its base, and random tokens and a few short conversations "
            "are scored one sequence at a time. The export is refused when it cannot be read, or "
            "when a token's log-prob differs from the trained model's by more than 0.002 nats. "
            "The conversations travel with the model, with their ids and log-probs, in "
            "`probes.json`: `upweight check --model FOLDER` compares a copy or a conversion "
            "with them, and allows 0.3 nats where the weights are stored in bfloat16. The start's "
            "log-probs are there too: a copy that is twice as near to them as to the trained "
            "model's is refused, one that is nearer at all is reported. The same is "
            "asked of a `model` or `reference` that has the file, before step 1 and by `upweight "
            "check`, but where `lora.quantize` rounds it anew. A reward "
            "model is read back too, and must score four training prompts' responses as it did."
        ),
        guarded_by=(
            "Each folder of the export appears whole or not at all. An adapter is merged into its "
            "base in float32. Where the start has no name that an adapter could give for its base "
            "(an adapter that was merged, a .gguf file), it is written into a folder beside the "
            "adapter, and found there after both were moved. An adapter on a matrix that "
            "is embedding and head at once is an error."
        ),
        causes=(
            "The base model, which an adapter is read back on, was moved, changed or cleared from "
            "the cache during the run.",
            "The base model was updated on the hub after training.",
            "The base under an adapter that is the start of a run was trained on in place.",
            "Later: the run directory or the base was moved, or the export was converted to a "
            "smaller dtype or quantized (UW104).",
            "Updates of a small `optimizer.learning_rate` are smaller than what bfloat16 can hold: "
            "a conversion rounds the weights back to where training began.",
        ),
        do=(
            "Set `export.merge=true` to write a whole model, with the adapter beside it.",
            "Put the base back as it was and resume: the last checkpoint has what was trained, and "
            "`resume=true` exports it again.",
            "After each copy or conversion, before the model is served, run `upweight check "
            "--model FOLDER` with `probes.json` in that folder (beside a .gguf file).",
        ),
        detectors=(
            "upweight.models.export:rescore",
            "upweight.models.export:_require_same_scores",
            "upweight.recipes.exported:require_as_exported",
            "upweight.recipes.exported:_what_is_left",
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
            "Before a folder of the export appears, its tokenizer and template are read back and "
            "render some of the rows that were trained on, and a few conversations; the export is "
            "refused when one token id differs. The conversations travel with the model in "
            "`probes.json`, with the ids that training made of them; `upweight check "
            "--model FOLDER` renders them again with the tokenizer of that folder. What a server "
            "does is not seen: give it `messages` from that file, ask it for the token ids of the "
            "prompt (many servers have a tokenize endpoint), and compare them with `prompt_ids`. "
            "Where the chat template writes the day's date, all of it is done as of the day that "
            "training took, which `probes.json` has (`data.date`)."
        ),
        guarded_by=(
            "The tokenizer and its chat template are written into `model/`. A prompt is rendered "
            "as serving does, with a generation prompt, and nothing after the stop token is "
            "scored. Where a server must be told something to do the same, the run says so at its "
            "end. No row of your data is in `probes.json`."
        ),
        causes=(
            "The server uses a template of its own, or none.",
            "`data.template` was none, and the server uses the chat template; or the other way "
            "round.",
            "`data.template_options` of the run are not set on the server.",
            "The chat template writes the day's date, and the server has another day.",
            "The server adds beginning-of-text to a template that writes it already, or a system "
            "message of its own.",
        ),
        do=(
            "Serve from `model/`, with its own tokenizer and template.",
            "Pass the run's `data.template_options` with each request.",
            "Train with the system message that you serve with.",
        ),
        detectors=("upweight.models.probes:_renders_otherwise",),
    ),
)
