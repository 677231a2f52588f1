"""Draw the pictures of the experiments: quality-N.png from quality-N.json, both in this folder.

    python experiments/plot.py          (needs matplotlib: pip install matplotlib)

The JSON files are those of `quality.py --item N`. A picture is drawn if its file is there.
"""
import json
import operator
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import HERE, Parser, UserError, replacing, run_program, say         # noqa: E402

FOLDER = HERE / "experiments"
GREY = "#888888"
RIGHT = (-0.02, 1.04)           # the axis of shares of right answers
TITLES = {"facts": "needle retrieval", "lists": "multi-value retrieval",
          "classes": "many-shot classification", "copy": "copying", "prose": "prose, bits per byte"}

# Points of the paper's figures (the data files of arXiv 2512.17452, Llama-3.1-8B), as
# (admitted share, hard distillation loss). llama-3.1-8b_threshold.csv, W = 256: by lambda, at the
# thresholds tau of experiment 1.
PAPER_TAUS = {
    0.02: ((.639, .0040), (.632, .0040), (.625, .0042), (.614, .0043), (.605, .0045),
           (.589, .0058), (.576, .0101)),
    0.08: ((.371, .0136), (.361, .0142), (.351, .0147), (.334, .0157), (.318, .0166),
           (.294, .0276), (.266, .0404)),
    0.32: ((.207, .0403), (.195, .0419), (.181, .0438), (.159, .0478), (.136, .0552),
           (.104, .0832), (.082, .1391)),
    1.28: ((.109, .1089), (.097, .1129), (.082, .1182), (.059, .1311), (.040, .1506),
           (.023, .2073), (.016, .2794)),
}
# The same and llama-3.1-8b_threshold_local1.csv, at tau = 0.1, for lambda 0.16 to 2.56.
PAPER_WINDOWS = {
    "W = 256": ((.236, .0287), (.159, .0478), (.099, .0807), (.059, .1311), (.033, .1737)),
    "W = 1": ((.789, .0146), (.684, .0347), (.541, .0886), (.380, .2101), (.241, .4527)),
}


def read_rows(experiment):
    """(rows of policies, rows of full attention) of an experiment: no rows if there is no file."""
    path = FOLDER / f"quality-{experiment}.json"
    if not path.exists():
        return [], []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    full = [row for row in rows if row["settings"]["policy"] == "full attention"]
    policies = [row for row in rows if row["settings"]["policy"] != "full attention"]
    return policies, full


# ------------------------------------------------------------------------------- parts of pictures

def draw_curves(axis, rows, label, x, y, style="o-", named=True):
    """One line for each value of label(row): an interval row[y] over a number x(row).

    named: the lines get entries in the legend.
    """
    labels = list(dict.fromkeys(label(row) for row in rows))        # in the order of the file
    for n, name in enumerate(labels):
        points = sorted((x(row), row[y]["mean"], row[y]["low"], row[y]["high"])
                        for row in rows if label(row) == name)
        where, means, lows, highs = zip(*points)
        below = [mean - low for mean, low in zip(means, lows)]
        above = [high - mean for mean, high in zip(means, highs)]
        axis.errorbar(where, means, (below, above), fmt=style, markersize=3, linewidth=1.2,
                      elinewidth=0.6, label=name if named else None, color=f"C{n}")


def scale_shares(axis):
    """Across goes a share of a dense cache, or of the tokens."""
    axis.set_xscale("log")
    ticks = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1)
    axis.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks])
    axis.minorticks_off()
    axis.autoscale(axis="x")            # to the points: the ticks have widened the axis


def scale_tokens(axis, rows):
    """Across go the numbers of tokens that the rows were measured at."""
    axis.set_xscale("log")
    ticks = sorted({tokens_of(row) for row in rows})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axis.minorticks_off()
    axis.set_ylim(RIGHT)


def tokens_of(row):
    return row["settings"]["tokens"]


def draw_full_attention(axis, full, task):
    axis.axhline(full[0][task]["mean"], color=GREY, linewidth=0.8, label="full attention")


# ----------------------------------------------------------------------------------- the pictures

# Each takes pyplot and the rows of an experiment: (figure, the axes that get a legend).

def draw_sparsity(pyplot, rows, full):
    """1. Loss over the share admitted, and facts over the share kept, for lambda and tau."""
    def name(row):
        return f"lambda {row['settings'].get('lam', 'as given')}"

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, x, y in ((left, "admitted", "loss"), (right, "kept", "facts")):
        draw_curves(axis, rows, name, operator.itemgetter(x), y)
        scale_shares(axis)
        default = [row for row in rows if row["settings"]["tau"] == 0.1]
        axis.plot([row[x] for row in default], [row[y]["mean"] for row in default], "k*",
                  markersize=9, zorder=3, label="tau = 0.1")

    for n, points in enumerate(PAPER_TAUS.values()):
        label = "the paper, Llama-3.1-8B" if n == 0 else None       # one entry in the legend
        left.plot(*zip(*points), ":", color=GREY, label=label)
    left.set(yscale="log", xlabel="share admitted", ylabel="hard distillation loss")
    left.set_title("not the paper's model: only shapes compare", fontsize=9)

    draw_full_attention(right, full, "facts")
    right.set(xlabel="kept (bytes, of a dense cache)", ylabel=f"{TITLES['facts']}, right answers")
    return figure, (left, right)


def draw_grace_period(pyplot, rows, full):
    """2. Loss over the share admitted, with and without a window."""
    figure, axis = pyplot.subplots(figsize=(6, 4))
    draw_curves(axis, rows, lambda row: f"W = {row['settings']['W']}",
                operator.itemgetter("admitted"), "loss")
    scale_shares(axis)
    for style, (name, points) in zip((":", "--"), PAPER_WINDOWS.items()):
        axis.plot(*zip(*points), style, color=GREY, label=f"the paper, {name}")
    axis.set(yscale="log", xlabel="share admitted outside the window",
             ylabel="hard distillation loss")
    axis.set_title("not the paper's model: only shapes compare", fontsize=9)
    return figure, (axis,)


def draw_policies(pyplot, rows, full):
    """3. Each task over the share kept, for each policy."""
    def name(row):      # the figures of 2026-11-24 call the sliding window "window only"
        return row["settings"]["policy"].replace("window only", "sliding window")

    figure, axes = pyplot.subplots(1, len(TITLES), figsize=(17, 3.6))
    for axis, (task, title) in zip(axes, TITLES.items()):
        draw_curves(axis, rows, name, operator.itemgetter("kept"), task)
        scale_shares(axis)
        draw_full_attention(axis, full, task)
        axis.set(xlabel="kept", title=title)
    # One legend for all, where it hides no curve.
    axes[0].legend(frameon=False, fontsize=7, loc="upper right", bbox_to_anchor=(1, 0.95))
    return figure, ()


def draw_tasks(pyplot, rows, full):
    """4. Two maps of a single fact by depth and length, and the tasks by length."""
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 3.8))
    lengths = sorted({row["settings"]["length"] for row in rows})
    depths = sorted({row["settings"]["depth"] for row in rows if "fact" in row})
    draw_map(axes[0], full, lengths, depths, "a single fact, full attention")
    draw_map(axes[1], rows, lengths, depths, "a single fact, gates")

    tasks = [task for task in TITLES if task != "prose"]
    for n, task in enumerate(tasks):
        for some, style, label in ((rows, "o-", TITLES[task]), (full, ":", None)):
            points = sorted((row["settings"]["length"], row[task]["mean"])
                            for row in some if task in row)
            x, y = [length for length, _ in points], [mean for _, mean in points]
            axes[2].plot(x, y, style, color=f"C{n}", markersize=3, label=label)
    axes[2].set(xscale="log", ylim=(0, 1.02), xlabel="tokens",
                title="gates (lines) and full attention (dotted)")
    axes[2].set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes[2].minorticks_off()
    return figure, axes[2:]


def draw_map(axis, rows, lengths, depths, title):
    """Right answers about a single fact, by depth (down) and length (across)."""
    means = {(row["settings"]["depth"], row["settings"]["length"]): row["fact"]["mean"]
             for row in rows if "fact" in row}
    missing = float("nan")
    grid = [[means.get((depth, length), missing) for length in lengths] for depth in depths]
    axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (depth, length), mean in means.items():
        axis.text(lengths.index(length), depths.index(depth), f"{mean:.0%}", ha="center",
                  va="center", fontsize=8)
    axis.set(xlabel="tokens", ylabel="depth of the fact", title=title)
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])


def draw_heads(pyplot, rows, full):
    """7. The share of a text that each head admits."""
    figure, axis = pyplot.subplots(figsize=(4.5, 4))
    image = axis.imshow(rows[0]["map"], vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, label="share of the tokens admitted")
    axis.set(xlabel="KV head", ylabel="layer", title=rows[0]["settings"]["text"])
    return figure, ()


def draw_selection(pyplot, rows, full):
    """8. Right answers over the most tokens of a row that decode attends to."""
    selected = [row for row in rows if "tokens" in row["settings"]]
    [gates] = [row for row in rows if row not in selected]
    tasks = ("facts", "lists", "classes")
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6))
    for axis, task in zip(axes, tasks):
        draw_curves(axis, selected, policy_of, tokens_of, task)
        scale_tokens(axis, selected)
        draw_full_attention(axis, full, task)
        axis.axhline(gates[task]["mean"], color=GREY, linewidth=0.8, linestyle="--",
                     label="gates, all that they keep")
        axis.set(xlabel="tokens of a row attended to, at most", title=TITLES[task])
    axes[0].set_ylabel("right answers")
    return figure, axes[:1]


def draw_hard_bound(pyplot, rows, full):
    """9. Right answers over the bound, for prompts (lines) and decoded texts (dotted)."""
    tasks = ("facts", "lists", "classes")
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6))
    for axis, task in zip(axes, tasks):
        prompts, decoded = [
            [row for row in rows if task in row and row["settings"]["decoded"] == is_decoded]
            for is_decoded in (False, True)]
        draw_curves(axis, prompts, policy_of, tokens_of, task)
        draw_curves(axis, decoded, policy_of, tokens_of, task, "x:", named=False)
        scale_tokens(axis, prompts)
        draw_full_attention(axis, full, task)
        axis.set(xlabel="bound, in tokens a row", title=TITLES[task])
    axes[0].set_ylabel("right answers")
    axes[0].plot([], [], "x:", color="black", markersize=3, linewidth=1.2, label="a decoded text")
    return figure, axes[:1]


def draw_rising_tau(pyplot, rows, full):
    """10. Right answers over the bytes kept: a fixed tau, and a budget, for each lambda."""
    def name(row):
        return f"lambda {row['settings']['lam']}"

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, task in zip(axes, ("facts", "classes")):
        for policy, style in (("fixed tau", "o-"), ("budget", "s--")):
            some = [row for row in rows if policy_of(row) == policy]
            draw_curves(axis, some, name, lambda row: row[task]["kept"], task, style,
                        named=policy == "fixed tau")
        scale_shares(axis)
        draw_full_attention(axis, full, task)
        axis.set(xlabel="kept (bytes, of a dense cache)", title=TITLES[task], ylim=RIGHT)
    for style, label in (("o-", "fixed tau"), ("s--", "budget")):
        axes[0].plot([], [], style, color="black", markersize=3, linewidth=1.2, label=label)
    axes[0].set_ylabel("right answers")
    return figure, axes[:1]


def policy_of(row):
    return row["settings"]["policy"]


PICTURES = {1: draw_sparsity, 2: draw_grace_period, 3: draw_policies, 4: draw_tasks, 7: draw_heads,
            8: draw_selection, 9: draw_hard_bound, 10: draw_rising_tau}


def main(argv=None):
    Parser(description=__doc__).parse_args(argv)
    try:
        import matplotlib
        matplotlib.use("Agg")           # files only: no window, no display
        from matplotlib import pyplot
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None

    found = {experiment: read_rows(experiment) for experiment in PICTURES}
    found = {experiment: both for experiment, both in found.items() if both[0]}
    if not found:
        raise UserError(f"{FOLDER} has no figures: experiments/quality.py --item N makes them")
    for experiment, (rows, full) in found.items():
        figure, with_legend = PICTURES[experiment](pyplot, rows, full)
        for axis in with_legend:
            axis.legend(frameon=False, fontsize=7)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        path = FOLDER / f"quality-{experiment}.png"
        with replacing(path) as part:
            figure.savefig(part, dpi=150, format="png")
        pyplot.close(figure)
        say(f"{path} drawn")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
