"""UW1xx: the reference is the wrong one, or the arithmetic loses what is learned."""

from __future__ import annotations

from upweight.trust.codes.page import Page

PAGES: tuple[Page, ...] = (
    Page(
        code="UW101",
        title="The reference is not the model that the policy starts from",
        severity="refuses",
        warns_of="a `reference` that was named",
        meaning=(
            "The implicit reward is beta times the log of how much likelier a response is under "
            "the policy than under the reference. A policy that starts as its reference starts "
            "with rewards of 0 and a loss of ln 2. With another reference the rewards begin with "
            "the difference of the two models, and training works against that difference as much "
            "as for the preferences."
        ),
        found_by=(
            "Before step 1, and by `upweight check`, the policy, with its adapter, scores four "
            "training prompts, and each "
            "response is held against the reference's log-probs: 0.001 nats per token are allowed "
            "in float32, 0.1 in bfloat16, and more where tokens are few. With `reference` null a "
            "difference is refused. With a "
            "`reference` that you named it is reported: the first `loss` in `metrics.jsonl` is "
            "then not ln 2 = 0.6931. A run that learns from its own answers, and is pulled to a "
            "named reference, is asked by its answers to four prompts. In every round it also "
            "compares the log-probs that the sampler drew tokens with and the trainer's. More than "
            "that rounding is refused, as a mean over all tokens, over the last ones or over one "
            "answer; so is a difference that does not average out, or that grows with how "
            "unlikely a token is, as at another temperature (bfloat16: 0.005 nats a token and "
            "0.01 a nat, plus four standard errors)."
        ),
        guarded_by=(
            "While `reference` is null, the reference log-probs are computed from the policy "
            "itself before step 1, with the same weights and dtype. An adapter folder given as "
            "`model` is merged into its base first, so that the start and the reference are the "
            "tuned model and not its base. A reference with another vocabulary is an error."
        ),
        causes=(
            "`reference` names the base model, and `model` a fine-tuned one.",
            "`reference` and `model` name two checkpoints of one training run.",
            "One of the two is a quantized copy of the other, such as a .gguf file.",
            "The server of `rollout.server` holds another model, or serves in another dtype.",
        ),
        do=(
            "Leave `reference` out: the model as it starts is then the reference.",
            "Give the fine-tuned model or its adapter folder as `model`.",
            "Of a server: serve what `model` names, in the dtype that `compute.dtype` is.",
            "If another reference is what you want, expect a first loss other than ln 2, and "
            "compare rewards only with runs that have the same reference.",
        ),
        source="Rafailov et al. 2023, section 4 (arXiv:2305.18290)",
        detectors=(
            "upweight.trust.identity:starts_elsewhere",
            "upweight.recipes.drawing:require_same_policy",
        ),
    ),
    Page(
        code="UW102",
        title="The policy is compared with itself throughout",
        severity="refuses",
        meaning=(
            "The reference shares its weights with the policy, so it moves at every step. The "
            "margin stays 0 and the loss stays ln 2, while the weights change and nothing holds "
            "them back."
        ),
        found_by=(
            "From the second training record on, where the log-ratios of chosen and rejected are "
            "exactly 0 though the first step has moved weights: the policy scores a training row, "
            "and again after each record. Once most of that row's tokens have other log-probs than "
            "before and the log-ratios are still exactly 0, the run is refused. Updates of a small "
            "learning rate, or of a long warmup, can be too small for a forward pass in bfloat16 "
            "to show; nothing is said of those before the end (UW307). Not where "
            "`rollout.renew_reference` has just made the policy its own reference."
        ),
        guarded_by=(
            "The reference is data: its log-probs are computed before step 1 and kept as numbers, "
            "which no update can move. For the sampled KL the reference is the model with its "
            "adapter off, or a second copy that is loaded from disk."
        ),
        causes=(
            "A training script of your own gives the policy as a live reference.",
            "Reference log-probs were filled in after the first update.",
        ),
        do=(
            "Fill the reference before the first update, from the model as it starts.",
            "In a script of your own, copy the model or switch its adapter off.",
        ),
        detectors=("upweight.trust.watch.weights:is_the_reference",),
    ),
    Page(
        code="UW103",
        title="Nothing is learned",
        severity="refuses",
        warns_of="a plan whose learning rates are too small or too few, before step 1",
        meaning=(
            "The run finishes, and the model it writes answers as the one it began with. No "
            "gradient reached the trained weights, or the updates were too small to matter."
        ),
        found_by=(
            "Before step 1, and by `upweight check`: AdamW moves a weight by about its learning "
            "rate at most in a step, whatever the gradient's size, and by less where "
            "`optimizer.epsilon` is large beside `optimizer.max_grad_norm`. Where the rates of all "
            "steps come to less than `preflight.reach`, which is some ten-thousandth of a weight's "
            "usual size, it is reported, and the run goes on. Of an adapter, whose second factor "
            "starts at 0, the rates are taken times its first. That margins are no larger at the "
            "end than at the start is UW307. After the first step: some 256 elements of every "
            "trained tensor are compared with what they were before. If none has moved the run is "
            "refused; the message says whether no gradient arrived (`grad_norm` is 0) or the "
            "updates were too small for the weights to hold. Refused as well: weights that move by "
            "their decay alone, and layers in which nothing has moved while `watch.moved` of what "
            "else can move has, which is looked at until it is so: the first factor of an adapter "
            "stands still for as long as the second is 0. So is a value model whose head stands "
            "still and, after `watch.patience` steps or at the last one, one with such layers: "
            "what reaches these passes the head, which starts as 0. And "
            "a run that learns from its own answers, of which in so many steps none earned more "
            "than another to its prompt or, in PPO, than any other."
        ),
        guarded_by=(
            "A model without a trainable parameter is an error, and so are `lora.targets` that "
            "match no layer and an `optimizer.learning_rate` of 0. A response without tokens is "
            "left out and counted. Warmup never spends an update on a rate of 0."
        ),
        causes=(
            "The learning rate is too small for so few steps. Where none is set it is 5e-7 for "
            "full training and 1e-5 for LoRA.",
            "There are fewer rows than `batch.pairs_per_step`, so that an epoch is one step.",
            "The run is so short that `optimizer.warmup` takes much of it.",
            "The reward tells no two answers to a prompt apart.",
            "The preferences carry no signal that generalizes; then the training loss falls and "
            "the held-out one does not (UW306).",
        ),
        do=(
            "Raise `optimizer.learning_rate` (try ten times the value) or `epochs`, or lower "
            "`batch.pairs_per_step`.",
            "Read the model line that the run prints at its start: it says how many parameters "
            "are trained.",
            "Train on a few rows (`data.limit=8`) for many `epochs`: if `rewards/accuracies` does "
            "not reach 1 on rows seen so often, the fault is not in the amount of data.",
        ),
        detectors=(
            "upweight.trust.preflight:hardly_moves",
            "upweight.trust.watch.weights:nothing_learns",
            "upweight.trust.watch.weights:_some_do_not",
            "upweight.trust.watch.weights:nothing_is_taught",
        ),
    ),
    Page(
        code="UW104",
        title="Weights in bfloat16 swallow the updates",
        severity="refuses",
        meaning=(
            "bfloat16 keeps 8 significant bits: next to a weight w its neighbours lie between "
            "w/256 and w/128 away. An update smaller than half of that is rounded to nothing. At "
            "learning rates of preference training most updates are, so part of the model never "
            "moves."
        ),
        found_by=(
            "After the first step, where trained weights are in half precision: fewer than "
            "`watch.moved` of the elements that are looked at have moved, and not none (UW103). "
            "Weights that upweight loads are in float32: this is about models that code of your "
            "own casts. To see it in a model that is already trained, compare two checkpoints."
        ),
        guarded_by=(
            "Weights are loaded and updated in float32, whatever `compute.dtype` is; bfloat16 is "
            "used for matrix products alone."
        ),
        causes=(
            "A training script of your own casts the model to bfloat16 before it trains.",
            "The trained model was converted to bfloat16 afterwards, which rounds small changes "
            "away in the same manner.",
        ),
        do=(
            "Train with `upweight train`, or keep float32 master weights in your own script.",
            "Measure a converted model before it is used: `upweight score --model CONVERTED "
            "--reference START --data FILE --out scores.jsonl`, and compare its margins with "
            "those of the model in float32.",
        ),
        source="Micikevicius et al. 2018, section 3.1 (arXiv:1710.03740)",
        detectors=("upweight.trust.watch.weights:swallowed",),
    ),
    Page(
        code="UW105",
        title="Log-probs are summed in half precision",
        severity="refuses",
        meaning=(
            "A response's log-prob is a sum over its tokens, often hundreds of nats below 0. "
            "Between 256 and 512 the numbers of bfloat16 are 2 apart, those of float16 a quarter. "
            "A margin is a difference of such sums, so it would be mostly rounding."
        ),
        found_by=(
            "Wherever token log-probs are summed, their dtype must be float32 or float64; the "
            "message names the one that was found, and the rows."
        ),
        causes=(
            "Code of your own passes half-precision log-probs to `response_logps` or `pair_logps`.",
            "A bug in upweight.",
        ),
        do=(
            "Cast logits to float32 before the log-softmax, and sum what comes out.",
            "If there is no code of your own between the two, report it.",
        ),
        detectors=("upweight.models.logprobs:response_logps",),
    ),
    Page(
        code="UW106",
        title="Dropout or other noise is on",
        severity="refuses",
        meaning=(
            "A reward is the difference of two log-probs. Noise in either is noise in the reward: "
            "margins of pairs that are alike are then random, and a policy that equals its "
            "reference does not start at a loss of ln 2."
        ),
        found_by=(
            "Before step 1, and by `upweight check`, the model scores a training row twice, as "
            "in training, whatever the objective; the two must agree to the last bit. It is not "
            "asked where `lora.dropout` is above 0."
        ),
        guarded_by=(
            "Models are put into evaluation mode when they are loaded and stay in it, so their "
            "own dropout is off, in training too. Reference log-probs are computed without an "
            "adapter. `lora.dropout` is 0 unless you set it, and then acts on the training steps "
            "alone: evaluations, samples and scores are made without it."
        ),
        causes=(
            "`lora.dropout` is above 0: the adapter's dropout is on in training steps, and the "
            "metrics of a step are of the noisy policy.",
            "The model's own code draws random numbers in its forward pass.",
            "A script of your own calls `model.train()`.",
        ),
        do=(
            "Set `lora.dropout` to 0.",
            "Put the model into evaluation mode in a script of your own.",
        ),
        detectors=("upweight.trust.identity:require_quiet",),
    ),
    Page(
        code="UW107",
        title="The reference log-probs that were kept are not this reference's",
        severity="refuses",
        meaning=(
            "Reference log-probs are kept on disk and used again by later runs. If they are of "
            "other weights or of other tokens, every reward is off by a number that differs from "
            "row to row, and nothing else in the run looks wrong."
        ),
        found_by=(
            "They are kept by content: under the fingerprint of weights, config and dtype, and "
            "under the exact token ids of prompt and response. At every start and resume that "
            "uses kept values, 8 rows spread over the data are computed again. The run is "
            "refused when a response's log-probs differ by more than rounding explains: on "
            "average over its tokens, 0.001 nats in float32 or 0.1 in bfloat16, and more where "
            "they are few: over 4 tokens three times as much."
        ),
        causes=(
            "Files of the cache were copied, edited or damaged.",
            "The machine, its drivers or a library changed, and with them the arithmetic.",
            "The model's code has changed, which its fingerprint does not see.",
        ),
        do=(
            "Delete the folder that the message names: the values are computed again.",
            "Set the environment variable `UPWEIGHT_CACHE` to a folder that only this machine "
            "uses.",
            "If fresh values differ again in bfloat16, compare with `compute.dtype=float32`.",
        ),
        detectors=("upweight.models.reference:verify",),
    ),
    Page(
        code="UW108",
        title="An evaluation is scored against the wrong reference",
        severity="refuses",
        meaning=(
            "Rewards, margins and accuracy are relative to a reference. Measured against another "
            "one than the policy was trained against, they answer another question, and two runs "
            "cannot be compared."
        ),
        found_by=(
            "At every evaluation that samples answers (`evaluation.samples` above 0), the "
            "fingerprint of the reference model (its weights, config and dtype) is computed and "
            "compared with that of the log-probs which training reads. The run is stopped when "
            "they differ. With LoRA, where the reference stays in memory, the bits of its weights "
            "are summed first, and the fingerprint is computed anew where a sum has changed. What "
            "`upweight score` is told is not compared with any run: see that "
            "`--reference` names the model that the run began with and that `--beta` is the run's."
        ),
        guarded_by=(
            "Within a run, training and all evaluations read the same reference log-probs. "
            "Resuming a run with a reference of another fingerprint is an error."
        ),
        causes=(
            "The model folder was overwritten while the run went on, or between training and "
            "scoring.",
            "`--reference` of `upweight score` names another model than the run's.",
            "`compute.dtype` differs, which makes it another reference.",
        ),
        do=(
            "Put the files of the reference back as they were, then resume the run.",
            "Score again with the run's own `model`, or its `reference` where one was set; both "
            "are in `run.yaml`.",
            "Compare `reference_fingerprint` in `environment.json` of the runs that you compare, "
            "and set `compute.dtype` to the same value in all of them.",
        ),
        detectors=("upweight.recipes.reference:same_reference",),
    ),
    Page(
        code="UW109",
        title="An option that was accepted does nothing",
        severity="refuses",
        meaning=(
            "You set an option, the run takes it, and nothing reads it. The result is then "
            "credited to a setting that was never in effect."
        ),
        found_by=(
            "Before anything is computed, each value that is not the default is held against the "
            "keys that the command and the `objective` read; the message names those that read "
            "it. Refused as well: keys of an evaluation without `evaluation.sets` or "
            "`evaluation.fraction`, keys of samples while `evaluation.samples` is 0, "
            "`export.merge` without `lora`, `policy.clip_low`, `policy.clip_high`, "
            "`policy.value_clip` and `policy.kl_stop` where a round is one step, "
            "`policy.kl_estimator` and `rollout.renew_reference` while `loss.beta` is 0, a "
            "variable in `data.template_options`, or in a row's own, that the chat template never "
            "looks up, a "
            "`data.date` where it writes none, and `data.pairing` or "
            "`data.min_score_gap` where no row has scores."
        ),
        guarded_by=(
            "A key that does not exist is refused, with the nearest one that does, or with what a "
            "name of another program is called here. Two values for one key in the same place are "
            "refused, and so are `steps` and `epochs` together. `run.yaml` in the run directory "
            "has every value with where it came from; what was left open is there as what it "
            "became."
        ),
        causes=(
            "The option belongs to another objective or command.",
            "What it acts on is switched off by another key.",
            "A variable in `data.template_options` is spelled otherwise in this chat template.",
        ),
        do=(
            "Leave the option out, or switch on what it acts on.",
            "Look a value up in `run.yaml` of the run, with its origin: of file, flag and "
            "key=value the later one holds.",
        ),
        detectors=(
            "upweight.config.commands:require_read",
            "upweight.config.commands:require_read_to_choose",
            "upweight.recipes.rendering:renderer_for",
            "upweight.recipes.rendering:_require_template_reads",
            "upweight.recipes.rendering:require_rows_read",
            "upweight.recipes.sets:_require_scores",
            "upweight.recipes.sets:_require_turns",
            "upweight.recipes.prepare:_require_margins",
            "upweight.recipes.score:score_file",
            "upweight.recipes.start:_require_offload_has_effect",
        ),
    ),
)
