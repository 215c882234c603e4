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
            "Before step 1, on up to three training rows of different length: each response's "
            "tokens are scored with all rows packed as training packs them, and each response in a "
            "row alone, without neighbours, siblings or padding. The first token is also read "
            "from a padded batch, as sampling does it. A token that differs by more than rounding "
            "is refused: 0.002 nats with float32 weights, whatever `compute.dtype` is."
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
        detectors=("upweight.trust.identity:_worst",),
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
            "Two ways, at every step. The bins that a step is packed into must hold as many "
            "preferences and responses as the step's rows have. And what the objective counted "
            "over all micro-batches must equal, to one part in 100,000, the weight that each of "
            "them was divided by."
        ),
        guarded_by=(
            "The pairs of a step are chosen first and packed second. The weight of all of them is "
            "summed before the first backward pass, and each part is divided by that sum."
        ),
        causes=(
            "An objective of your own returns means, or counts pairs where rows carry weights.",
            "A fault of the packing loses or repeats pairs or responses.",
        ),
        do=(
            "Return sums over the forest's pairs, and the sum of their weights as the count.",
            "Where the message names the packing, report it with a few rows.",
        ),
        detectors=(
            "upweight.trust.watch.orders:require_whole_step",
            "upweight.training.guard:_refuse_miscounted",
        ),
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
            "and the message names up to 8 rows, those whose loss is not finite where only some "
            "are, and what broke first: a weight, the forward pass or the backward pass. The "
            "weights are as before the step, and `metrics.jsonl` and the report have the refusal. "
            "Log-probs and scores outside of steps are looked at where they are made: the "
            "reference's, those of evaluations and of sampled answers, a reward model's, and those "
            "of `upweight score`; the rows are asked alone, and those that are to blame named."
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
            "began: if they are refused there too, the model or the row is at fault.",
            "Try `compute.dtype=float32`.",
            "Start a new run with another `out`: a run is resumed with its own settings only, and "
            "would come to the same step.",
        ),
        detectors=(
            "upweight.models.finite:_refuse",
            "upweight.training.guard:_refuse_nonfinite",
        ),
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
            "`logratios/chosen` divided by `tokens/chosen` is below minus `watch.displaced`, in "
            "nats per token: over the last eight training records, or over six held-out pairs or "
            "more at an evaluation. At the default the chosen responses are, token by token, "
            "less than e to the -0.5 = 0.61 times as likely as at the start. Near-identical pairs "
            "are named as the cause where chosen and rejected share four fifths of their tokens, "
            "the learning rate otherwise. Smaller losses show in `metrics.jsonl` and in the report."
        ),
        guarded_by=(
            "The report says so when the chosen responses of the evaluation lost half a nat or "
            "more, on average, against the reference; its headline is then no success, if this was "
            "reported."
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
        detectors=("upweight.trust.watch.curves:displaced",),
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
            "At each evaluation, against the reference's answers to the same prompts. Length: "
            "the 95 % interval of `length_ratio`, how many times as long the policy's answer to a "
            "prompt is, lies above `watch.length` or below its inverse. A run with `objective=sft` "
            "is to learn the lengths of its training responses: its answers must besides be "
            "`watch.length` times as long as these, or as short. Repetition: `repetition` "
            "is the share of four tokens in a row that the answer has had before; the lower end of "
            "its 95 % interval is more than `watch.repetition` above `reference_repetition`. Stop "
            "token: the upper end of the interval of `stopped`, the share of answers that end by "
            "themselves, is below `watch.stopped` times `reference_stopped`. A run that learns "
            "from its own answers is asked the same of each round against its first, by the ends "
            "of both 95 % intervals."
        ),
        guarded_by=(
            "It is the headline of the report for as long as the last evaluation, or the last "
            "round where nothing is evaluated, is still beyond the limit. Before step 1 a run "
            "and `upweight check` say where none of this can be seen: nothing is held out, "
            "too few prompts are answered, or the reference's own answers are cut. The "
            "report has the answers side by side, and says so when the policy's are on average "
            "more than 1.25 times as long as the reference's, or the reference's more than 1.25 "
            "times as long as the policy's."
        ),
        causes=(
            "The policy went too far from the reference (UW308).",
            "The data reward length (UW211).",
            "Chosen responses lack their end, so that stopping is unlearned (UW203, UW205).",
        ),
        do=(
            "Lower `optimizer.learning_rate`, raise `loss.beta`, or train for fewer `epochs`.",
            "Raise `evaluation.samples`, to judge by more than a few prompts, and "
            "`evaluation.max_new_tokens`, if the reference's answers are cut too. `samples.jsonl` "
            "has the answers.",
            "Keep the best checkpoint by a held-out metric: `checkpoint.best`.",
        ),
        source="repetition: Welleck et al. 2020 (arXiv:1908.04319)",
        detectors=(
            "upweight.trust.watch.answers:length_runs_away",
            "upweight.trust.watch.answers:repeats_itself",
            "upweight.trust.watch.answers:does_not_stop",
            "upweight.trust.watch.rounds:_changed",
        ),
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
            "Three ways. Over the last eight training records `rewards/accuracies` is at least "
            "`watch.solved` with a mean margin of `watch.learned` or more, or the `loss` of one "
            "(at the default 0.01): nothing is left to learn. Or, at an evaluation, training "
            "accuracy is `watch.known` (by default 0.9 or more), and the 95 % interval of the "
            "held-out accuracy reaches down to 0.5 and lies below it: the rows are known by "
            "heart. Or the whole interval lies above `watch.easy`: no improvement can show."
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
            "upweight.trust.watch.curves:too_easy",
            "upweight.trust.watch.curves:not_better_than_chance",
            "upweight.trust.watch.curves:held_out_is_solved",
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
            "`rewards/spread` is the mean size of beta times the margin of log-ratios. On pairs "
            "that were not trained on yet, which are those of the first epoch (over eight "
            "training records) and those of an evaluation, it is above `watch.spread`: beta is "
            "named as the cause where the log-ratios are less than `watch.kl` nats apart, the "
            "learning rate otherwise. Or it is below `watch.flat` at the last step: of a "
            "run of 30 steps or more its mean over the last records, of a shorter one the largest "
            "of them (but for step 1, which is from before any update). The headline of the report "
            "says so too."
        ),
        guarded_by=(
            "`dpo` has sums and no option to take means, as in the paper. `loss.beta` is 0.1 "
            "unless you set it."
        ),
        causes=(
            "`loss.beta` was taken from a recipe with length-normalized log-probs, such as SimPO.",
            "A beta was chosen on short responses and used on long ones.",
            "`optimizer.learning_rate` is far too large, or far too small.",
        ),
        do=(
            "Set `loss.beta=0.1`, and change it by factors of 2 or 3 from there.",
            "Compare runs by their `kl` and held-out accuracy, not by the size of rewards.",
        ),
        source=(
            "Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); means: Meng et al. 2024 "
            "(arXiv:2405.14734)"
        ),
        detectors=(
            "upweight.trust.watch.curves:saturated",
            "upweight.trust.watch.curves:flat",
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
            "At each evaluation: `kl_low`, the lower end of the 95 % interval of the sampled KL in "
            "nats per answer, is above `watch.kl`. Beta is named as the cause where beta times "
            "that distance is below 1, the learning rate otherwise. Answers longer than "
            "`evaluation.max_new_tokens` count up to there. In a run that learns from its own "
            "answers, at each round too. Not with `objective=sft`, which is meant to leave its "
            "start. A sampled KL whose whole interval is below 0, by more "
            "than `watch.below`, is reported as well: no KL is negative, so that this estimate of "
            "it says nothing of the distance."
        ),
        guarded_by=(
            "The report shows the last value with its interval, and its headline is no success "
            "where this was reported and that value is still above `watch.kl`."
        ),
        causes=(
            "`optimizer.learning_rate` is too large.",
            "Too many `epochs`.",
            "`loss.beta` is so small that little holds the policy to the reference, or was "
            "chosen for log-probs that are counted otherwise (UW307).",
            "Where `kl` is below 0: few prompts, which have not met the rare answers that carry "
            "the distance, or answers that are not the policy's own.",
        ),
        do=(
            "Lower `optimizer.learning_rate`.",
            "Raise `loss.beta`.",
            "Raise `evaluation.samples`: from few prompts the interval is wide.",
            "Compare runs at equal `kl`, and keep the checkpoint where held-out accuracy stopped "
            "rising (`checkpoint.best`).",
        ),
        source="Rafailov et al. 2024 (arXiv:2406.02900)",
        detectors=(
            "upweight.trust.watch.answers:far_from_the_reference",
            "upweight.trust.watch.answers:kl_below_zero",
        ),
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
            "A digest of the rows in the order in which they were trained on, made anew for each "
            "epoch, is that of an earlier epoch. Epochs of fewer than ten rows are not compared."
        ),
        guarded_by=(
            "The order of an epoch is drawn from `seed` and the number of the epoch. A resumed "
            "run draws the same ones."
        ),
        causes=("What chooses the rows of a step shuffles once, or forgets the epoch.",),
        do=("Draw an order for each epoch from the seed and the epoch's number.",),
        detectors=("upweight.trust.watch.weights:same_order",),
    ),
)
