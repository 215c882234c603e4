"""UW3xx: training itself goes wrong, or goes well on paper only."""

from __future__ import annotations

from upweight.trust.codes.page import Page

PAGES: tuple[Page, ...] = (
    Page(
        code="UW301",
        title="Rows that are packed together see each other",
        severity="refuses",
        meaning=(
            "Many prompts and responses share one forward pass. A token that attends to a "
            "neighbour's row, or has its position counted from there, gets the log-prob of "
            "another text. The numbers stay plausible."
        ),
        found_by=(
            "score the same rows packed, and then one prompt at a time with a row per response: "
            "`upweight score --model MODEL --data FILE --out packed.jsonl`, and again with "
            "`--tokens_per_bin 1 --sharing false` and another `--out`. The log-probs of a row "
            "must agree up to rounding."
        ),
        guarded_by=(
            "When a model is loaded, each way of packing is held against transformers' own "
            "forward pass, one sequence at a time, on a probe of two prompts with five responses; "
            "with float32 weights no token may differ by more than 0.002 nats, and the gradient "
            "at no token by more than a thousandth of its size. A way that fails "
            "is not used, and the model line of the run names the one that is. A model that "
            "passes in no way is refused."
        ),
        causes=(
            "A layer reads its neighbours by other means than attention, beyond the length of "
            "the probe.",
            "The model's own code ignores the attention function that it is given.",
        ),
        do=(
            "Set `compute.sharing=false`: one row per response, on the model's own attention.",
            "Report the model's name and the difference.",
        ),
    ),
    Page(
        code="UW302",
        title="The gradient depends on how a step was cut up",
        severity="refuses",
        meaning=(
            "A step's loss is the mean over its pairs. If each part of a step takes its own mean "
            "and the means are averaged, the pairs of a small part weigh more, and the result "
            "depends on memory settings."
        ),
        found_by=(
            "run one step twice, `steps=1`, with another `batch.tokens_per_bin`. `loss` and "
            "`grad_norm` in `metrics.jsonl` must agree up to rounding."
        ),
        guarded_by=(
            "The pairs of a step are chosen first and packed second. The weight of all of them is "
            "summed before the first backward pass, and each part is divided by that sum."
        ),
        causes=(
            "A training script of your own divides each part by its own count.",
            "Rows carry weights, and the division is by their number.",
        ),
        do=("Divide by the count of the whole step, as `fit` does.",),
    ),
    Page(
        code="UW303",
        title="The loss or a gradient is not a finite number",
        severity="refuses",
        meaning=(
            "One infinite or undefined number in the gradient makes every weight undefined at the "
            "next update. A run that replaces it with 0 goes on and hides that some rows are "
            "never learned."
        ),
        found_by=(
            "After the backward pass of every step, the step's loss and the joint norm of all "
            "gradients must be finite. If not, the run is refused before the optimizer sees them, "
            "and the message names up to 8 rows of the step. The weights are as before the step."
        ),
        causes=(
            "The learning rate is too high, and the model came apart in the steps before.",
            "The model's weights contain an infinity or NaN, or its arithmetic overflows in "
            "bfloat16.",
            "A row carries an extreme weight.",
        ),
        do=(
            "Look at `grad_norm` in the last lines of `metrics.jsonl`: if it grew for many "
            "steps, lower `optimizer.learning_rate`.",
            "Score the rows that the message names with `upweight score` and the model as it "
            "began: if a log-prob is not finite there, the model or the row is at fault.",
            "Try `compute.dtype=float32`.",
            "Start a new run with another `out`: a run is resumed with its own settings only, and "
            "would come to the same step.",
        ),
        detectors=("upweight.training.loop:_refuse_nonfinite",),
    ),
    Page(
        code="UW304",
        title="The chosen responses become less likely (likelihood displacement)",
        severity="warns",
        meaning=(
            "The loss sees only the difference between chosen and rejected. It falls while both "
            "lose probability, if the rejected ones lose more. The probability that they lose "
            "goes to responses that nobody preferred."
        ),
        found_by=(
            "Over the last eight training records: `logratios/chosen` divided by `tokens/chosen` "
            "is below minus `watch.displaced`, in nats per token. Smaller losses show in "
            "`metrics.jsonl` and in the report."
        ),
        guarded_by=(
            "The report says so when the chosen responses of the evaluation lost half a nat or "
            "more, on average, against the reference."
        ),
        causes=(
            "Chosen and rejected are nearly the same text, so that their gradients push on the "
            "same tokens.",
            "The responses are improbable under the reference (UW212).",
            "Too many steps, or too large a learning rate.",
        ),
        do=(
            "Leave out pairs that are nearly the same: `data.pairing=extremes` keeps the best "
            "against the worst, and `data.min_score_gap` drops close scores.",
            "Lower `optimizer.learning_rate`, or stop earlier with fewer `epochs`.",
            "Raise `loss.beta`.",
            "Fine-tune on the chosen responses first, and give the result as `model`.",
        ),
        source="Pal et al. 2024 (arXiv:2402.13228); Razin et al. 2024 (arXiv:2410.08847)",
        detectors=("upweight.trust.watch:displaced",),
    ),
    Page(
        code="UW305",
        title="Sampled answers degenerate",
        severity="warns",
        meaning=(
            "The policy ranks given responses well and writes badly: it repeats itself, does not "
            "stop, or writes ever longer answers. Accuracy and loss do not show it, because they "
            "never look at what the policy writes."
        ),
        found_by=(
            "At each evaluation: `length`, the mean tokens of the sampled answers, is more than "
            "`watch.length` times `reference_length`, or less than its inverse. Repetition is not "
            "measured: read `samples.jsonl`, which has answers of policy and reference to the "
            "same prompts."
        ),
        guarded_by=(
            "The report has the answers side by side, and says so when the policy's are on "
            "average more than 1.25 times as long as the reference's, or the reference's more "
            "than 1.25 times as long as the policy's."
        ),
        causes=(
            "The policy went too far from the reference (UW308).",
            "The data reward length (UW211).",
            "The stop token is not learned (UW203).",
        ),
        do=(
            "Lower `optimizer.learning_rate`, raise `loss.beta`, or train for fewer `epochs`.",
            "Raise `evaluation.samples`, to judge by more than a few prompts, and "
            "`evaluation.max_new_tokens`, if the reference's answers are cut too.",
            "Keep the best checkpoint by a held-out metric: `checkpoint.best`.",
        ),
        detectors=("upweight.trust.watch:length_runs_away",),
    ),
    Page(
        code="UW306",
        title="Accuracy is saturated, and nothing improves",
        severity="warns",
        meaning=(
            "Training accuracy near 1 says that the pairs are known by heart. Held-out accuracy "
            "near 1 from the first evaluation on says that the pairs are too easy to tell two "
            "models apart. In neither case does a further step show in the numbers."
        ),
        found_by=(
            "Two ways. Over the last eight training records `rewards/accuracies` is at least "
            "`watch.solved` with a mean `loss` of 0.01 or less: nothing is left to learn. Or, at "
            "an evaluation, training accuracy is 0.9 or more and the 95 % interval of the "
            "held-out accuracy, 0.6 or less, reaches down to 0.5."
        ),
        guarded_by=(
            "The report claims that the policy learned the preferences only if the interval of "
            "the held-out accuracy lies above chance. Without held-out preferences it says that "
            "this is not known."
        ),
        causes=(
            "Nothing is held out, so only training accuracy is seen.",
            "Few prompts, passed over many times.",
            "A shortcut solves the pairs (UW211), or the prompts are in both sets (UW209).",
        ),
        do=(
            "Set `evaluation.fraction` (such as `evaluation.fraction=0.1`) or `evaluation.sets`.",
            "Use more prompts, and fewer `epochs`.",
            "Evaluate on pairs that differ in what you care about and in little else.",
        ),
        detectors=(
            "upweight.trust.watch:too_easy",
            "upweight.trust.watch:not_better_than_chance",
        ),
    ),
    Page(
        code="UW307",
        title="Beta does not fit how log-probs are counted",
        severity="warns",
        meaning=(
            "Under `dpo` log-ratios are summed over a response. A beta from a method that takes "
            "the mean per token is larger by about the number of tokens: with sums, the loss then "
            "saturates after a few steps. The other way round, a beta for sums with means leaves "
            "the loss near ln 2."
        ),
        found_by=(
            "look at the spread of `margin` in `ledger.parquet`, which is beta times the "
            "difference of log-ratios. Margins that are far out in the flat parts of the sigmoid "
            "after a few steps say that beta is too large. Margins that are still close to 0 at "
            "the end say that it is too small, or that nothing was learned (UW103)."
        ),
        guarded_by=(
            "`dpo` has sums and no option to take means, as in the paper. `loss.beta` is 0.1 "
            "unless you set it."
        ),
        causes=(
            "`loss.beta` was taken from a recipe with length-normalized log-probs, such as SimPO.",
            "A beta was chosen on short responses and used on long ones.",
        ),
        do=(
            "Set `loss.beta=0.1`, and change it by factors of 2 or 3 from there.",
            "Compare runs by their `kl` and held-out accuracy, not by the size of rewards.",
        ),
        source=(
            "Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); means: Meng et al. 2024 "
            "(arXiv:2405.14734)"
        ),
    ),
    Page(
        code="UW308",
        title="The policy runs away from the reference",
        severity="warns",
        meaning=(
            "KL(policy, reference) is the price of what was learned. When it grows without bound, "
            "the policy exploits what the preferences fail to say, and answers get worse while "
            "the held-out loss and accuracy may still improve."
        ),
        found_by=(
            "At each evaluation: `kl_low`, the lower end of the 95 % interval of the sampled KL "
            "in nats per answer, is above `watch.kl`. Answers longer than "
            "`evaluation.max_new_tokens` count up to there."
        ),
        guarded_by=("The report shows the last value with its interval, without judging it."),
        causes=(
            "`optimizer.learning_rate` is too large.",
            "Too many `epochs`.",
            "`loss.beta` is so small that little holds the policy to the reference, or was "
            "chosen for log-probs that are counted otherwise (UW307).",
        ),
        do=(
            "Lower `optimizer.learning_rate`.",
            "Raise `loss.beta`.",
            "Raise `evaluation.samples`: from few prompts the interval is wide.",
            "Compare runs at equal `kl`, and keep the checkpoint where held-out accuracy stopped "
            "rising (`checkpoint.best`).",
        ),
        source="Rafailov et al. 2024 (arXiv:2406.02900)",
        detectors=("upweight.trust.watch:far_from_the_reference",),
    ),
    Page(
        code="UW309",
        title="Every epoch has the same order",
        severity="warns",
        meaning=(
            "Rows that follow each other always follow each other. Steps then have the same pairs "
            "in each epoch, and the last rows of the order weigh more in the final weights."
        ),
        found_by=(
            "compare `epoch_order(100, seed, 0)` and `epoch_order(100, seed, 1)` of "
            "`upweight.data.stream` in Python: two different orders. With `epochs` of 1 or less "
            "there is nothing to find."
        ),
        guarded_by=(
            "The order of an epoch is drawn from `seed` and the number of the epoch. A resumed "
            "run draws the same ones."
        ),
        causes=("A training script of your own shuffles once, before the first epoch.",),
        do=("Draw an order for each epoch from the seed and the epoch's number.",),
    ),
)
