"""The README's six drawings of the mechanism: `python assets/figures.py` writes assets/*.svg.

    token.svg       a token's life: the ring, the gate, and then a page or nothing
    pages.svg       two rows of very different lengths in one page pool
    prefill.svg     what one block of queries reads in prefill
    decode.svg      how decode's work is split among programs, and combined again
    primitives.svg  one row's tokens under admission, eviction and selection
    training.svg    the curve of the sparsity loss, and the tiles of the training kernels

Standard library only. For each drawing NAME, NAME_example() works out a small example by the rules
of wgkv.py and kernels.py, and draw_NAME() draws it: so the numbers in a drawing are computed.
Coordinates are px of a page that is 760 wide; y grows downwards. A color means the same in all
drawings: see COLORS.
"""
import argparse
import math
import random
from html import escape
from pathlib import Path
from types import SimpleNamespace as Example            # the numbers of one drawing, by name

FOLDER = Path(__file__).resolve().parent
WIDTH = 760

# Each is (fill, line, text), first on a light page and then on a dark one. Blue, orange and bluish
# green stay apart for color-blind readers, and whatever has a color has a label too.
COLORS = {
    # in the ring, in the window
    "window": (("#b9d9f8", "#1f78c8", "#0f5ea8"), ("#1b4471", "#79bdff", "#79bdff")),
    # its gate reached tau; promoted
    "admitted": (("#ffd79b", "#c86a00", "#8f4700"), ("#6a400f", "#f7ab4e", "#f7ab4e")),
    # not admitted, evicted, or not read; a slot or page that nobody uses
    "gone": (("#e9ecef", "#7d8590", "#505963"), ("#262c35", "#7d8590", "#a9b3bd")),
    # queries, their outputs, and the pages they chose
    "query": (("#bdebd3", "#0f8f58", "#096b41"), ("#12573a", "#4ad392", "#4ad392")),
}
INK = ("#1f2328", "#e6edf3")            # text, light and dark
SOFT = ("#505963", "#a9b3bd")           # secondary text, axes, plain lines


# ------------------------------------------------------------------------------ drawing helpers

def theme_rules(theme):
    """CSS of one theme, 0 light and 1 dark. A class named as a color sets both fill and line."""
    rules = [f"text{{fill:{INK[theme]}}}",
             f"text.soft{{fill:{SOFT[theme]}}}",
             f".plain{{fill:none;stroke:{SOFT[theme]}}}",
             f".solid.plain{{fill:{SOFT[theme]};stroke:none}}",
             f".strong{{fill:none;stroke:{INK[theme]}}}"]
    for name, themes in COLORS.items():
        fill, line, text = themes[theme]
        rules.append(f".{name}{{fill:{fill};stroke:{line}}}")
        rules.append(f".solid.{name}{{fill:{line};stroke:none}}")
        rules.append(f"text.{name}{{fill:{text};stroke:none}}")
    return "".join(rules)


STYLE = (
    'text{font:13px -apple-system,BlinkMacSystemFont,"Segoe UI","Noto Sans",Helvetica,Arial,'
    "sans-serif}"
    ".small{font-size:12px}.bold{font-weight:600}.middle{text-anchor:middle}.end{text-anchor:end}"
    + theme_rules(0)
    + f"@media (prefers-color-scheme:dark){{{theme_rules(1)}}}"
    # These come after the colors, and so take fill or line away from them.
    + ".line{fill:none;stroke-width:1.5}.dashed{fill:none;stroke-dasharray:4 3}.area{stroke:none}"
      ".thick{stroke-width:2.5}.thin{stroke-width:.6}.edge{stroke-width:1.5}"
)


def number(x):
    """A coordinate with at most one decimal: 12.0 -> 12, 12.345 -> 12.3."""
    return f"{x:.1f}".removesuffix(".0")


def ceil_div(a, b):
    return -(-a // b)


class Figure:
    """One SVG: a list of its elements. `style` is always a string of CSS classes."""

    def __init__(self, name, height, title, description):
        self.name = name
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(description)}</desc>',
            f"<style>{STYLE}</style>",
        ]

    def rect(self, x, y, width, height, style, radius=3):
        x, y, width, height = (number(value) for value in (x, y, width, height))
        self.parts.append(f'<rect class="{style}" x="{x}" y="{y}" width="{width}" '
                          f'height="{height}" rx="{radius}"/>')

    def text(self, x, y, text, style=""):
        """Text with its baseline at y. It starts at x, or has x as its "middle" or "end"."""
        style = f' class="{style}"' if style else ""
        self.parts.append(f'<text{style} x="{number(x)}" y="{number(y)}">{escape(text)}</text>')

    def box(self, x, y, width, height, text, style, text_style=""):
        """A rectangle with a text in its middle."""
        self.rect(x, y, width, height, style)
        self.text(x + width / 2, y + height / 2 + 4.5, text, f"middle {text_style}".strip())

    def path(self, d, style):
        self.parts.append(f'<path class="{style}" d="{d}"/>')

    def line(self, points, style):
        """A line through points (x, y)."""
        self.path("M" + "L".join(f"{number(x)} {number(y)}" for x, y in points), style)

    def polygon(self, points, style):
        self.path("M" + "L".join(f"{number(x)} {number(y)}" for x, y in points) + "Z", style)

    def arrow(self, points, color):
        """A line through points with a head at its end."""
        (x0, y0), (x1, y1) = points[-2:]
        length = math.hypot(x1 - x0, y1 - y0)
        ux, uy = (x1 - x0) / length, (y1 - y0) / length         # the direction of the last piece
        back_x, back_y = x1 - 9 * ux, y1 - 9 * uy
        self.line([*points[:-1], (back_x, back_y)], f"{color} line")
        self.polygon([(back_x - 4.5 * uy, back_y + 4.5 * ux), (x1, y1),
                      (back_x + 4.5 * uy, back_y - 4.5 * ux)], f"solid {color}")

    def bracket(self, x0, x1, y, style, ends=6):
        """A horizontal bracket at y. Its ends point down, or up where `ends` is negative."""
        self.line([(x0, y + ends), (x0, y), (x1, y), (x1, y + ends)], f"{style} line")

    def write(self):
        text = "\n".join([*self.parts, "</svg>", ""])
        path = FOLDER / f"{self.name}.svg"
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{path.name}: {len(text.encode()):,} bytes")


# ------------------------------------------------------------------------------- 1. a token's life

PLACES_X = 558              # where the rows of gone tokens and of page slots begin,
PLACE_STEP = 43             # from one of their places to the next,
PLACE_WIDTH = 38            # and how wide a place is
CHOICE_X = 428              # the center of the question "gate >= tau?"
CHOICE_Y = 160


def token_example():
    """One row after 14 tokens: what is in its ring and its page, and what is gone."""
    window = 8
    tau = 0.1
    gates = [0.98, 0.02, 0.05, 0.64, 0.01, 0.03, 0.31, 0.04, 0.02, 0.87, 0.06, 0.03, 0.02, 0.05]

    # Token t takes place t mod W. The token that was there leaves, and only now its gate counts.
    ring = {}
    promoted = []
    gone = []
    for t in range(len(gates)):
        place = t % window
        if place in ring:
            leaving = ring[place]
            if gates[leaving] >= tau:
                promoted.append(leaving)
            else:
                gone.append(leaving)
        ring[place] = t
    new = len(gates)
    place = new % window
    leaving = ring[place]
    assert gates[leaving] >= tau, "the drawing shows a token that is promoted"
    return Example(window=window, page_size=4, tau=tau, gates=gates, ring=ring, promoted=promoted,
                   gone=gone, new=new, place=place, leaving=leaving)


def draw_token(e):
    """What happens in a row when its next token arrives."""
    fig = Figure("token", 392, "A token's life",
                 f"Token {e.new} takes place {e.new} mod {e.window} = {e.place} of a ring of "
                 f"{e.window}. Token {e.leaving}, which was there, leaves the window. Its gate is "
                 f"at least tau = {e.tau}, so it is copied to the row's page, behind tokens "
                 f"{e.promoted}. Tokens {e.gone} had smaller gates and are gone. A query sees the "
                 "ring and the pages.")
    draw_ring(fig, 180, 220, e.ring, e.gates, e.tau, e.place)
    fig.text(24, 30, "g: the gate of a token", "small soft")
    fig.text(24, 47, "g ≥ tau: admitted", "small bold admitted")
    draw_arrival(fig, e)
    draw_outcomes(fig, e)
    draw_query(fig, e)
    fig.write()


def draw_arrival(fig, e):
    """The new token comes in from above; the one whose place it takes leaves to the right."""
    fig.box(192, 20, 112, 32, f"new token {e.new}", "window", "bold")
    fig.arrow([(248, 52), (248, 115)], "window")
    fig.text(259, 88, f"takes place {e.new} mod {e.window} = {e.place}")

    left = CHOICE_X - 64
    right = CHOICE_X + 64
    fig.arrow([(290, CHOICE_Y), (left - 2, CHOICE_Y)], "plain")
    fig.text(330, CHOICE_Y + 18, f"{e.leaving} leaves", "small soft middle")
    fig.polygon([(left, CHOICE_Y), (CHOICE_X, CHOICE_Y - 36), (right, CHOICE_Y),
                 (CHOICE_X, CHOICE_Y + 36)], "plain")
    fig.text(CHOICE_X, CHOICE_Y - 1, "gate ≥ tau?", "middle")
    fig.text(CHOICE_X, CHOICE_Y + 15, f"tau = {e.tau}", "small soft middle")


def draw_outcomes(fig, e):
    """No: gone. Yes: behind the promoted tokens of its row."""
    end = PLACES_X - 6                      # of both arrows
    label = PLACES_X + 44
    fig.arrow([(CHOICE_X + 64, CHOICE_Y), (end, CHOICE_Y)], "plain")
    fig.text(520, CHOICE_Y - 8, "no", "middle bold")
    fig.text(PLACES_X, 131, "gone", "bold")
    fig.text(label, 131, "place overwritten", "soft")
    for place, t in enumerate(e.gone):
        fig.box(PLACES_X + PLACE_STEP * place, 142, PLACE_WIDTH, 36, str(t), "gone dashed", "soft")

    fig.arrow([(CHOICE_X, CHOICE_Y + 36), (CHOICE_X, 262), (end, 262)], "admitted")
    fig.text(440, 232, "yes", "bold")
    fig.text(PLACES_X, 233, "page", "bold")
    fig.text(label, 233, f"P = {e.page_size} tokens here", "soft")
    for place in range(e.page_size):
        x = PLACES_X + PLACE_STEP * place
        if place < len(e.promoted):
            fig.box(x, 244, PLACE_WIDTH, 36, str(e.promoted[place]), "admitted", "bold")
        elif place == len(e.promoted):
            fig.box(x, 244, PLACE_WIDTH, 36, str(e.leaving), "admitted dashed", "admitted bold")
        else:
            fig.rect(x, 244, PLACE_WIDTH, 36, "gone dashed")


def draw_query(fig, e):
    """The query below, which sees the ring and the page."""
    y = 344
    fig.box(CHOICE_X - 32, y - 16, 64, 32, "query", "query", "bold")
    fig.text(CHOICE_X, y + 36, "sees the ring, now with 14, and the page", "small soft middle")
    fig.arrow([(CHOICE_X - 32, y), (346, y), (298, 272)], "query")
    end = PLACES_X + PLACE_STEP * (len(e.promoted) + 1) - 5     # of the tokens in the page
    fig.bracket(PLACES_X, end, 292, "query", ends=-6)
    middle = (PLACES_X + end) / 2
    fig.arrow([(CHOICE_X + 32, y), (middle, y), (middle, 294)], "query")


def draw_ring(fig, cx, cy, ring, gates, tau, upper_right):
    """The ring as a circle of places, with the place `upper_right` at 45 degrees."""
    inner, outer = 62, 122
    step = 2 * math.pi / len(ring)

    def point(radius, angle):               # the angle is 0 at the top and grows clockwise
        return cx + radius * math.sin(angle), cy - radius * math.cos(angle)

    for place, t in sorted(ring.items()):
        middle = math.radians(45) + (place - upper_right) * step
        corners = [point(outer, middle - step / 2), point(outer, middle + step / 2),
                   point(inner, middle + step / 2), point(inner, middle - step / 2)]
        a, b, c, d = (f"{number(x)} {number(y)}" for x, y in corners)
        style = "gone dashed" if place == upper_right else "window"     # this token is leaving
        fig.path(f"M{a}A{outer} {outer} 0 0 1 {b}L{c}A{inner} {inner} 0 0 0 {d}Z", style)
        x, y = point((inner + outer) / 2 + 1, middle)
        fig.text(x, y - 2, str(t), "middle bold")
        gate_style = "admitted bold" if gates[t] >= tau else "soft"
        fig.text(x, y + 13, f"g {gates[t]}", f"middle small {gate_style}")
        x, y = point(outer + 22, middle)
        fig.text(x, y + 4, f"place {place}", "middle small soft")
    fig.text(cx, cy - 11, "ring", "middle bold")
    fig.text(cx, cy + 7, f"W = {len(ring)} places", "middle")
    fig.text(cx, cy + 25, f"tokens {min(ring.values())} … {max(ring.values())}",
             "middle small soft")


# ------------------------------------------------------------------------ 2. two rows in one pool

def hand_out_pages(R, promoted_pages, freed, spare):
    """The page tables of two rows, the free stack and the pool's size, as PagePool makes them.

    Row one had an earlier text. While it ran, both rows promoted in turn; when it ended, its
    `freed` pages of promoted tokens went back on top of the stack. That leaves holes in the pool.
    """
    pool_size = 1 + 2 * R + promoted_pages + freed + spare      # page 0 is the dummy
    free = list(range(pool_size - 1, 0, -1))                    # the top is the end: page 1
    row_one = [free.pop() for _ in range(R)]
    row_two = [free.pop() for _ in range(R)]
    earlier_text = []
    for _ in range(freed):
        row_two.append(free.pop())
        earlier_text.append(free.pop())
    while len(row_two) < R + promoted_pages:
        row_two.append(free.pop())
    free += earlier_text
    return (row_one, row_two), free, pool_size


PAGE_WIDTH = 38
PAGE_STEP = 42              # from one page to the next
POOL_TOP = 176


def pages_example():
    """A row of 120 tokens and a row of 40,000: page tables, pool and free stack."""
    W = 128
    P = 64
    R = ceil_div(W, P)
    tokens = (120, 40_000)
    share = 0.45                                        # of row two's tokens are admitted
    counts = (0, round(share * (tokens[1] - W)))        # row one's tokens are all in its window
    promoted_pages = ceil_div(counts[1], P)
    partial = counts[1] - (promoted_pages - 1) * P      # tokens in the last page
    freed = 3
    tables, free, pool_size = hand_out_pages(R, promoted_pages, freed, spare=3)

    # Which pages hold something: (color, slots in use).
    held = {}
    for table, num_tokens, count in zip(tables, tokens, counts):
        for column, page in enumerate(table):
            if column < R:
                held[page] = ("window", min(P, min(num_tokens, W) - column * P))
            else:
                held[page] = ("admitted", min(P, count - (column - R) * P))
    return Example(W=W, P=P, R=R, tokens=tokens, counts=counts, promoted_pages=promoted_pages,
                   partial=partial, freed=freed, tables=tables, free=free, pool_size=pool_size,
                   held=held)


def draw_pages(e):
    """The pool in the middle, a page table above and one below, and the free stack."""
    fig = Figure("pages", 440, "Two rows in one page pool",
                 f"Row one has {e.tokens[0]} tokens, all in its ring of {e.R} pages. Row two has "
                 f"{e.tokens[1]:,} tokens: {e.R} ring pages and {e.promoted_pages} pages of "
                 f"promoted tokens, the last with {e.partial} of {e.P} slots in use. Each row's "
                 "page table lists its pages in the common pool. Unused entries are 0, the dummy "
                 "page. Free pages are on a stack.")
    center = draw_pool(fig, e)
    table_one, table_two = e.tables
    page_table(fig, table_one, e.R, len(table_two), 52, POOL_TOP, center)
    page_table(fig, table_two, e.R, len(table_two), 318, POOL_TOP + e.P, center)

    x = 474
    fig.text(274, 98, "unused: 0, the dummy page", "middle small soft")
    fig.text(x, 52, f"row one: {e.tokens[0]} tokens", "bold")
    fig.text(x, 70, f"all in its window of W = {e.W},", "soft")
    fig.text(x, 87, "nothing promoted yet", "soft")
    fig.text(x, 322, f"row two: {e.tokens[1]:,} tokens", "bold")
    fig.text(x, 340, f"{e.counts[1]:,} promoted: {e.promoted_pages - 1} whole pages,", "soft")
    fig.text(x, 357, f"and {e.partial} tokens in a partial page", "soft")
    draw_free_stack(fig, e.free, e.freed)
    fig.write()


def draw_pool(fig, e):
    """The first pages of the pool and its last ones; returns {page: the x of its center}."""
    last = e.tables[1][-1]
    center = {}
    for place, page in enumerate([*range(12), *range(last, e.pool_size)]):
        x = 24 + PAGE_STEP * place + (44 if page >= last else 0)
        center[page] = x + PAGE_WIDTH // 2
        if page in e.held:
            color, slots = e.held[page]                 # one px of a page's height is one slot
            fig.rect(x, POOL_TOP, PAGE_WIDTH, slots, f"{color} area", 1)
            fig.rect(x, POOL_TOP, PAGE_WIDTH, e.P, f"{color} line")
            fig.text(center[page], POOL_TOP + 37, str(page), "middle bold")
        else:
            name = "dummy" if page == 0 else "free"
            fig.rect(x, POOL_TOP, PAGE_WIDTH, e.P, "gone" if page == 0 else "gone dashed")
            fig.text(center[page], POOL_TOP + 37, str(page), "middle soft")
            fig.text(center[page], POOL_TOP - 8, name, "middle small soft")
    fig.text(550, POOL_TOP + 37, "…", "middle bold")
    fig.text(center[last] + 19, POOL_TOP - 8, f"{e.partial} of {e.P}", "end small admitted")
    fig.text(736, 138, f"one pool; a page has P = {e.P} slots", "end bold")
    return center


def draw_free_stack(fig, free, freed):
    """The whole free stack; its last `freed` pages came back from an earlier text."""
    left = 108
    fig.text(24, 413, "free stack", "bold")
    for place, page in enumerate(free):
        fig.box(left + PAGE_STEP * place, 394, PAGE_WIDTH, 28, str(page), "gone dashed", "soft")
    end = left + PAGE_STEP * len(free)
    fig.arrow([(end + 42, 408), (end + 2, 408)], "plain")
    fig.text(end + 50, 404, "top: the next page that a row gets", "soft")
    ids = ", ".join(str(page) for page in free[-freed:])
    fig.text(end + 50, 421, f"({ids} came back from an older text)", "small soft")


def page_table(fig, table, R, columns, y, pool_edge, center):
    """One row's page table at y, with an arrow from each entry to the edge of its page."""
    above = y < pool_edge
    left = 66                               # where the entries begin
    fig.text(24, y + 12, "page", "small soft")
    fig.text(24, y + 26, "table", "small soft")
    shown = [*range(R + 4), columns - 1, columns]
    for place, column in enumerate(shown):
        x = left + PAGE_STEP * place + (44 if column > R + 3 else 0)
        fig.text(x + 19, y - 9 if above else y + 44, str(column), "middle small soft")
        if column >= len(table):
            fig.box(x, y, PAGE_WIDTH, 28, "0", "gone", "soft")
            continue
        color = "window" if column < R else "admitted"
        page = table[column]
        fig.box(x, y, PAGE_WIDTH, 28, str(page), color)
        if above:
            fig.arrow([(x + 19, y + 28), (center[page], pool_edge - 2)], color)
        else:
            fig.arrow([(x + 19, y), (center[page], pool_edge + 3)], color)
    fig.text(340, y + 19, "…", "middle bold")
    if above:                               # what the columns are, said once
        middle = left + PAGE_STEP * R - 2            # between the ring's entries and the others
        fig.bracket(left, middle - 2, 25, "window")
        fig.text((left - 2 + middle) / 2, 17, f"ring, R = {R}", "middle window")
        fig.bracket(middle + 2, 440, 25, "admitted")
        fig.text((middle + 442) / 2, 17, "promoted tokens, oldest first", "middle admitted")


# ------------------------------------------------------------------------------------- 3. prefill

def admitted_runs(T, share, seed):
    """Runs of admitted keys, half-open (first, end). The first tokens are admitted."""
    rng = random.Random(seed)
    runs = []
    position = 0
    while position < T:
        length = rng.randint(16, 64)
        runs.append((position, min(position + length, T)))
        position += length + round(length * (1 / share - 1) * rng.uniform(0.5, 1.5))
    return runs


TRIANGLE_X = 92             # the triangle's upper left corner
TRIANGLE_Y = 24
TOKEN_PX = 0.05             # of a token in the triangle, across and down
KEY_PX = 0.5                # of a key in memory, across,
QUERY_PX = 0.75             # and of a query there, down


def prefill_example():
    """One block of queries, and the keys that it reads."""
    T = 6000
    W = 256
    P = 64
    t0 = 5000 // P * P                                  # the block of P queries around 5,000
    t1 = t0 + P
    runs = admitted_runs(T, share=0.2, seed=75)

    # As in kernels.prefill_kernel: first the pages, with what is older than the first query's
    # window, and then the band, from where that window begins to the last query itself.
    band_start = t0 - W + 1
    num_old = sum(max(0, min(end, band_start) - first) for first, end in runs)
    band_keys = t1 - band_start
    return Example(T=T, W=W, P=P, t0=t0, t1=t1, runs=runs, band_start=band_start, num_old=num_old,
                   num_pages=ceil_div(num_old, P), band_keys=band_keys,
                   band_tiles=ceil_div(band_keys, P), dense_tiles=ceil_div(t1, P))


def draw_prefill(e):
    """The block in the T x T triangle, and as memory sees it."""
    fig = Figure("prefill", 476, "What a block of queries reads in prefill",
                 "Above, the causal triangle: vertical stripes are admitted keys, the slash is the "
                 f"window, and the queries {e.t0:,} to {e.t1 - 1:,} are highlighted. Below, the "
                 f"keys that they read: {e.num_old} admitted ones in {e.num_pages} pages, then a "
                 f"band of {e.band_keys} keys in {e.band_tiles} tiles with the exact mask. Dense "
                 f"attention would read {e.dense_tiles} tiles.")
    share = round(100 * e.num_old / e.band_start)
    triangle(fig, e.T, e.W, e.runs, e.t0, e.t1, f"stripes: admitted keys, {share}%")
    tile_counts(fig, e.P, e.dense_tiles, e.num_pages, e.band_tiles)

    left = 46
    top = 392
    height = QUERY_PX * e.P
    draw_block_in_memory(fig, e, left, top, height)

    # From the block in the triangle to the block in memory.
    y = TRIANGLE_Y + TOKEN_PX * (e.t0 + e.t1) / 2
    middle = top + height / 2
    fig.line([(88, y), (20, y), (20, middle), (left - 12, middle)], "query line")
    fig.line([(left - 5, top), (left - 12, top), (left - 12, top + height),
              (left - 5, top + height)], "query line")
    fig.write()


def draw_block_in_memory(fig, e, left, top, height):
    """The pages that the block reads, and then its band."""
    step = 34                                           # from one page to the next
    right = left + step * e.num_pages - 2
    below = top + height + 20
    fig.text(left, top - 22, f"pages: {e.num_old} admitted keys, older than the window", "admitted")
    fig.bracket(left, right, top - 13, "admitted")
    for page in range(e.num_pages):
        x = left + step * page
        held = min(e.P, e.num_old - page * e.P)
        fig.rect(x, top, KEY_PX * held, height, "admitted area", 0)
        fig.rect(x, top, KEY_PX * e.P, height, "admitted line", 0)
        fig.text(x + KEY_PX * e.P / 2, top + height / 2 + 4.5, str(page), "middle")
    in_last = e.num_old - (e.num_pages - 1) * e.P
    fig.text(left, below, "no mask: every query of the block sees them", "soft")
    fig.text(right, below, f"the last: {in_last} of {e.P}", "end soft")

    x = right + 26
    fig.text(x, top - 22, f"band: {e.band_keys} keys", "window")
    fig.bracket(x, x + KEY_PX * e.band_keys, top - 13, "window")
    band(fig, x, top, e.W, e.P, e.band_tiles, e.band_start, e.runs)
    fig.text(x, below, "exact mask, key by key", "soft")


def triangle(fig, T, W, runs, t0, t1, stripes):
    """Which keys (across) each query (down) sees, 20 tokens a px; and what is what."""
    def at(key, query):
        return TRIANGLE_X + TOKEN_PX * key, TRIANGLE_Y + TOKEN_PX * query

    fig.polygon([at(0, 0), at(T, T), at(0, T)], "gone area")
    for first, end in runs:
        fig.polygon([at(first, first), at(end, end), at(end, T), at(first, T)], "solid admitted")
    fig.polygon([at(0, 0), at(T, T), at(T - W, T), at(0, W)], "solid window")
    x, y = at(0, t0)
    fig.rect(x - 3, y - 3, TOKEN_PX * t1 + 6, TOKEN_PX * (t1 - t0) + 6, "query line thick")
    fig.text(TRIANGLE_X, 16, "keys →", "small soft")
    fig.text(TRIANGLE_X - 8, 34, "queries ↓", "small soft end")
    fig.text(TRIANGLE_X - 8, TRIANGLE_Y + TOKEN_PX * T, f"T = {T:,}", "small soft end")

    # Labels along the slash, two of them with a line to what lies left of it.
    def label(query, text, style, key=None):
        x, y = at(query, query)
        fig.text(x + 14, y + 4, text, style)
        if key is not None:
            end, _ = at(key, query)
            fig.line([(x + 10, y), (end, y)], "plain")
            fig.rect(end - 2.5, y - 2.5, 5, 5, "solid plain", 2.5)

    def last_stripe(query):                 # the last one before the query's window
        return [run for run in runs if run[1] <= query - W][-1]

    label(1000, f"slash: the window, W = {W}", "window")
    first, end = last_stripe(2350)
    label(2350, stripes, "admitted", (first + end) / 2)
    _, end = last_stripe(3900)              # and between it and the window
    label(3900, "the rest: not admitted, not read", "soft", (end + 3900 - W) / 2)
    label((t0 + t1) / 2, f"a block of queries, {t0:,} … {t1 - 1:,}", "query bold")


def tile_counts(fig, P, dense_tiles, num_pages, band_tiles):
    """What is read with everything kept, and here: one bar a tile."""
    x, y = 420, 44
    fig.text(x, y, f"tiles of {P} keys that the block reads", "bold")
    fig.text(x, y + 26, f"dense: {dense_tiles}")
    for tile in range(dense_tiles):
        fig.rect(x + 4 * tile, y + 34, 3, 14, "solid plain", 0)
    total = num_pages + band_tiles
    fig.text(x, y + 74, f"write-gated: {num_pages} pages + {band_tiles} of the band = {total}")
    for tile in range(total):
        color = "admitted" if tile < num_pages else "window"
        fig.rect(x + 4 * tile, y + 82, 3, 14, f"solid {color}", 0)


def band(fig, x0, y0, W, P, tiles, band_start, runs):
    """The band's mask. The window of the block's query r is at the band's keys r .. r + W - 1."""
    def at(key, query):
        return x0 + KEY_PX * key, y0 + QUERY_PX * query

    fig.polygon([at(0, 0), at(W, 0), at(W + P, P), at(P, P)], "window area")
    for first, end in runs:                 # admitted keys that later queries have left behind
        first = max(first - band_start, 0)
        end = min(end - band_start, P)
        if first < end:
            fig.polygon([at(first, first), at(end, end), at(end, P), at(first, P)],
                        "solid admitted")
    for tile in range(tiles):
        fig.rect(x0 + KEY_PX * P * tile, y0, KEY_PX * P, QUERY_PX * P, "window line", 0)


# -------------------------------------------------------------------------------------- 4. decode

TILE = 30                   # the side of a tile in the list


def decode_example():
    """Three rows of tiles over five programs: the example of kernels.py, divided by its rules."""
    rows = (5, 1, 6)                                    # tiles of each
    programs = 5
    starts = [sum(rows[:row]) for row in range(len(rows))]

    # The longest piece is as short as the number of programs allows. A row's pieces differ by a
    # tile at most. parts: (program, row, first tile, end).
    longest = 1
    while sum(ceil_div(tiles, longest) for tiles in rows) > programs:
        longest += 1
    parts = []
    for row, tiles in enumerate(rows):
        splits = ceil_div(tiles, longest)
        for piece in range(splits):
            parts.append((len(parts), row, starts[row] + tiles * piece // splits,
                          starts[row] + tiles * (piece + 1) // splits))
    pieces = [range(first, end) for _, _, first, end in parts]
    return Example(rows=rows, longest=longest, starts=starts, pieces=pieces, parts=parts)


def draw_decode(e):
    """The rows' tiles and what becomes of their pieces; and the same tiles in time."""
    longest = max(e.rows)
    fig = Figure("decode", 376, "How decode's work is split and combined",
                 f"The {sum(e.rows)} tiles of {len(e.rows)} rows are cut into {len(e.pieces)} "
                 f"pieces of {e.longest} tiles at most, one for each program. A row of several "
                 "pieces has as many partial results, and the program that arrives last combines "
                 f"them. On the right, time: with one program per row the longest takes {longest} "
                 f"tiles, in pieces {e.longest}.")
    x_of = draw_tile_list(fig, e)
    combining(fig, e.parts, x_of)

    # The same tiles in time, where each takes equally long.
    by_row = [range(start, start + tiles) for start, tiles in zip(e.starts, e.rows)]
    timeline(fig, 22, "one program per row", by_row, e.starts)
    timeline(fig, 176, "one program per piece", e.pieces, e.starts)

    y = 364
    fig.text(24, y, "a tile is one page:", "small soft")
    fig.rect(142, y - 11, 13, 13, "window")
    fig.text(161, y, "the ring", "small soft")
    fig.rect(222, y - 11, 13, 13, "admitted")
    fig.text(241, y, "promoted tokens", "small soft")
    fig.text(490, y, "m, l, o: maximum, sum, weighted values", "small soft")
    fig.write()


def tile_color(tile, starts):
    """A row begins with its ring, here one page (W <= P)."""
    return "window" if tile in starts else "admitted"


def draw_tile_list(fig, e):
    """All tiles, with a gap between two pieces; returns {tile: its x}."""
    x_of = {}
    for program, tiles in enumerate(e.pieces):
        for tile in tiles:
            x_of[tile] = 24 + (TILE + 2) * tile + 10 * program
            fig.box(x_of[tile], 40, TILE, TILE, str(tile), tile_color(tile, e.starts))
    for row, tiles in enumerate(e.rows):
        left = x_of[e.starts[row]]
        right = x_of[e.starts[row] + tiles - 1] + TILE
        fig.bracket(left + 1, right - 1, 29, "plain")
        fig.text((left + right) / 2, 22, f"row {row}", "middle bold")
    for program, tiles in enumerate(e.pieces):
        left = x_of[tiles[0]]
        right = x_of[tiles[-1]] + TILE
        fig.bracket(left, right, 82, "plain", ends=-6)
        fig.text((left + right) / 2, 100, f"program {program}", "middle")
    return x_of


def combining(fig, parts, x_of):
    """From each piece of a row to the row's output."""
    for row in sorted({row for _, row, _, _ in parts}):
        mine = [part for part in parts if part[1] == row]
        centers = [(x_of[first] + x_of[stop - 1] + TILE) / 2 for _, _, first, stop in mine]
        middle = sum(centers) / len(centers)
        fig.rect(middle - 32, 292, 64, 40, "query")
        fig.text(middle, 309, f"row {row}", "middle bold")
        fig.text(middle, 325, "output", "middle")
        if len(mine) == 1:                              # nothing to combine
            fig.arrow([(middle, 107), (middle, 291)], "query")
            continue
        for center in centers:
            fig.arrow([(center, 107), (center, 129)], "plain")
            fig.rect(center - 32, 130, 64, 40, "plain")
            fig.text(center, 147, "partial", "middle small soft")
            fig.text(center, 163, "m, l, o", "middle")
            fig.arrow([(center, 170), ((middle + center) / 2, 199)], "plain")

        sharing = [str(program) for program, _, _, _ in mine]
        fig.rect(middle - 58, 200, 116, 58, "plain")
        fig.text(middle, 217, "combine", "middle bold")
        fig.text(middle, 234, f"by program {' or '.join(sharing)},", "middle small soft")
        fig.text(middle, 250, "whoever is last", "middle small soft")
        fig.arrow([(middle, 258), (middle, 291)], "query")


def timeline(fig, y, title, lanes, starts):
    """When each program is at work; lanes: the tiles of each."""
    left = 560
    step_width = 28
    lane_height = 26
    fig.text(490, y, title, "bold")
    for program, tiles in enumerate(lanes):
        top = y + 14 + lane_height * program
        fig.text(490, top + 16, f"program {program}", "small soft")
        for step, tile in enumerate(tiles):
            color = tile_color(tile, starts)
            fig.box(left + step_width * step, top, 26, 22, str(tile), color, "small")
    longest = max(len(tiles) for tiles in lanes)
    end = left + step_width * longest + 1
    bottom = y + 16 + lane_height * len(lanes)
    fig.line([(end, y + 8), (end, bottom)], "strong")
    fig.text(end, bottom + 16, f"{longest} tiles of time", "end bold")


# ------------------------------------------------------------------- 5. three primitives, one row

PART_WIDTH = 224            # of each of the three parts, which stand side by side
PART_X = (24, 268, 512)     # where each begins
PAGES_Y = 245               # of the pages below the plots
SMALL_STEP = 27             # from one of them to the next


def four_rows_of_gates(tau):
    """The gates of four rows that share a budget. The first row is drawn."""
    gates = [[0.99, 0.06, 0.24, 0.03, 0.71, 0.02, 0.31, 0.88, 0.04, 0.17, 0.93,
              0.05, 0.28, 0.01, 0.78, 0.43, 0.03, 0.64, 0.97, 0.07, 0.02, 0.21,
              0.83, 0.46, 0.04, 0.90, 0.26, 0.05, 0.58, 0.02, 0.75, 0.95, 0.41,
              0.04, 0.88, 0.19, 0.03, 0.69, 0.05, 0.27, 0.02, 0.86, 0.06, 0.04]]
    rng = random.Random(57)
    for share in (0.5, 0.2, 0.8):                       # of a row's tokens that are admitted
        row = []
        for _ in gates[0]:
            if rng.random() < share:
                row.append(1 - (1 - tau) * rng.random() ** 2)
            else:
                row.append(rng.uniform(0, tau))
        gates.append(row)
    return gates


def primitives_example():
    """One row of a small cache: what is written, what a budget removes, what a step reads."""
    W = 8
    P = 4
    tau = 0.1
    sinks = 4
    budget = 20                         # pages of promoted tokens, over all rows
    most_selected = 3                   # of a row's pages of promoted tokens, for a decode step
    gates = four_rows_of_gates(tau)

    # 1. Tokens leave the rings, until the promoted ones take more pages than the budget has.
    held = [[] for _ in gates]
    leaving = 0
    while pages_of(held, P) <= budget:
        for row, tokens in enumerate(held):
            if gates[row][leaving] >= tau:
                tokens.append(leaving)
        leaving += 1
    assert leaving + W == len(gates[0]), "the drawn row ends with its ring"

    # 2. The lowest gate goes, until 90% of the budget is enough. The first tokens do not compete.
    # Admission then goes on with tau': a gate must be larger than the last one that went.
    scores = sorted(gates[row][t] for row, tokens in enumerate(held) for t in tokens if t >= sinks)
    left = held
    while pages_of(left, P) > 9 * budget // 10:
        cut = scores.pop(0)
        left = [[t for t in tokens if t < sinks or gates[row][t] > cut]
                for row, tokens in enumerate(held)]
    new = [t for t in range(leaving, leaving + W) if gates[0][t] > cut]
    assert any(gates[0][t] <= cut for t in left[0]), "one token is held only as a sink"

    # 3. A step reads the partial page, and of the full ones those with the largest bounds.
    full, partial = divmod(len(left[0] + new), P)
    bounds = page_bounds(full, P)
    best_first = sorted(range(full), key=lambda page: bounds[page], reverse=True)
    if partial:
        most_selected -= 1
    return Example(W=W, P=P, tau=tau, sinks=sinks, budget=budget, gates=gates[0], held=held,
                   leaving=leaving, left=left, cut=cut, new=new, bounds=bounds,
                   chosen=best_first[:most_selected])


def draw_primitives(e):
    """The same row three times: under admission, eviction and selection."""
    promoted = len(e.held[0])
    before = pages_of(e.held, e.P)
    after = pages_of(e.left, e.P)
    fig = Figure("primitives", 362, "Admission, eviction and selection in one row",
                 f"Admission: {e.leaving} tokens have left the ring. {promoted} had a gate of at "
                 f"least tau = {e.tau} and were promoted to {pages_of(e.held[:1], e.P)} pages; the "
                 f"others were refused and are gone. Eviction: the promoted tokens of all rows "
                 f"take {before} pages, and the budget is {e.budget}. Those with the lowest gates "
                 f"are evicted until {after} pages are left. So tau rises to {e.cut:.2f}, and "
                 f"later tokens need that. This row loses {promoted - len(e.left[0])} tokens, none "
                 f"of its first {e.sinks}; the others move together. Selection: a decode step "
                 f"reads the ring, the partial page, and of {len(e.bounds)} full pages the "
                 f"{len(e.chosen)} with the largest bounds on q . k. The other pages stay.")
    first, second, third = PART_X
    draw_admission(fig, first, e)
    draw_eviction(fig, second, e)
    draw_selection(fig, third, e)
    draw_budget(fig, first, e.held, e.P, e.budget,
                f"all rows: {before} pages, the budget is {e.budget}")
    draw_budget(fig, second, e.left, e.P, e.budget,
                f"all rows' lowest gates go: {after} pages, 90%")
    fig.write()


def pages_of(rows, P):
    """Pages of P tokens that all these rows need."""
    return sum(ceil_div(len(tokens), P) for tokens in rows)


def page_bounds(num_pages, P, D=8):
    """Upper bounds of q . k in pages of P keys, as DualCache.select_pages computes them."""
    rng = random.Random(1)
    q = [rng.gauss(0, 1) for _ in range(D)]
    bounds = []
    for _ in range(num_pages):
        center = [rng.gauss(0, 1) for _ in range(D)]            # keys of a page resemble each other
        keys = [[x + rng.gauss(0, 0.4) for x in center] for _ in range(P)]
        low = [min(channel) for channel in zip(*keys)]
        high = [max(channel) for channel in zip(*keys)]
        bounds.append(sum(max(q[d] * low[d], q[d] * high[d]) for d in range(D)))
    return bounds


def heading(fig, x, name, meaning, words):
    """The head of a part of this drawing, and what its colors mean: (word, style, width)."""
    fig.text(x, 22, name, "bold")
    fig.text(x + PART_WIDTH, 22, meaning, "end soft")
    fig.line([(x, 30), (x + PART_WIDTH, 30)], "plain")
    for word, style, width in words:
        fig.rect(x + 0.5, 40, 9, 9, style, 0)
        fig.text(x + 15, 49, word, "small")
        x += width


def gate_height(g):
    """The y of a gate in the plots."""
    return 170 - 102 * g


def gate_plot(fig, x, gates, styles):
    """A bar for each gate that has a style. Returns where they begin, and the end."""
    step = (PART_WIDTH - 30) / len(gates)
    edges = [x + 30 + step * t for t in range(len(gates) + 1)]
    for g, left, style in zip(gates, edges, styles):
        if style:
            fig.rect(left + 0.7, gate_height(g), step - 1.4, gate_height(0) - gate_height(g),
                     style, 0)
    fig.text(x + 25, gate_height(1) + 5, "g = 1", "end small soft")
    fig.line([(edges[0], gate_height(0)), (edges[-1], gate_height(0))], "plain")
    return edges


def threshold(fig, x0, x1, tau, name):
    """The line that a gate must reach."""
    y = gate_height(tau)
    fig.line([(x0, y), (x1, y)], "strong")
    fig.text(x0 - 5, y, name, "end small bold")
    fig.text(x0 - 5, y + 13, f"{tau:.2f}".rstrip("0"), "end small")


def small_pages(fig, x, y, P, cells, color):
    """Pages side by side, filled from the top down; cells: a style for each token."""
    for place, style in enumerate(cells):
        page, slot = divmod(place, P)
        fig.rect(x + SMALL_STEP * page + 2, y + 2 + 7 * slot, 20, 6, style, 0)
    for page in range(ceil_div(len(cells), P)):
        fig.rect(x + SMALL_STEP * page, y, 24, 7 * P + 3, f"{color} line")


def draw_admission(fig, x, e):
    """Gates from tau on and below it, and those of the ring's tokens, which do not count yet."""
    heading(fig, x, "1. admission", "what is written",
            (("admitted", "solid admitted", 76), ("refused", "solid gone", 70),
             ("in the ring", "solid window", 0)))
    styles = ["solid admitted" if g >= e.tau else "solid gone" for g in e.gates[:e.leaving]]
    edges = gate_plot(fig, x, e.gates, styles + ["solid window"] * e.W)
    first = edges[0]
    ring = edges[e.leaving]                             # where the ring's tokens begin
    end = edges[-1]
    threshold(fig, first, ring, e.tau, "tau")           # not for the ring's tokens yet
    fig.bracket(first, ring - 2, 180, "plain", ends=-5)
    fig.bracket(ring + 1, end, 180, "window", ends=-5)
    fig.text((first + ring) / 2, 196, f"{e.leaving} have left the ring", "middle small")
    fig.text((ring + end) / 2, 196, "ring", "middle small window")

    # Below: where the tokens of the plot are now.
    right = x + PART_WIDTH
    promoted = len(e.held[0])
    fig.arrow([(x + 12, 202), (x + 12, 238)], "admitted")
    fig.text(x + 23, 224, f"{promoted} promoted", "small bold admitted")
    fig.text(right, 224, f"{e.leaving - promoted} refused: gone", "end small soft")
    small_pages(fig, x, PAGES_Y, e.P, ["admitted area"] * promoted, "admitted")
    ring_x = right - SMALL_STEP * ceil_div(e.W, e.P) + 3
    small_pages(fig, ring_x, PAGES_Y, e.P, ["window area"] * e.W, "window")
    fig.text(x, 292, f"one row: pages of {e.P} tokens", "small soft")
    fig.text(right, 292, "its ring", "end small soft")


def draw_eviction(fig, x, e):
    """The held tokens that tau' lets go, and how those that are left move together."""
    heading(fig, x, "2. eviction", "what is removed",
            (("held", "solid admitted", 54), ("evicted", "gone", 66), ("refused", "solid gone", 0)))
    before = e.held[0]
    left = e.left[0]
    styles = [""] * e.leaving + ["solid gone"] * e.W    # what was refused before is gone
    for t in before:
        styles[t] = "gone"
    for t in left + e.new:
        styles[t] = "solid admitted"
    # Between tau and tau' lies what goes, unless it is a sink. Later tokens there are refused.
    y = gate_height(e.cut)
    y_tau = gate_height(e.tau)
    fig.rect(x + 30, y, 194, y_tau - y, "gone area", 0)
    edges = gate_plot(fig, x, e.gates, styles)
    end = edges[-1]
    fig.line([(edges[0], y_tau), (end, y_tau)], "plain dashed")
    fig.text(x + 25, y_tau + 5, "tau", "end small soft")
    threshold(fig, edges[0], end, e.cut, "tau′")
    fig.bracket(edges[0], edges[e.sinks] - 1, 180, "plain", ends=-5)
    fig.bracket(edges[e.leaving] + 1, end, 180, "plain", ends=-5)
    fig.text(x + 10, 196, f"first {e.sinks} stay (sinks)", "small")
    fig.text(end, 196, "later: need tau′", "end small")

    # The row's pages before and after. Dashed: the later tokens that reached tau'.
    cells = ["admitted area" if t in left else "gone" for t in before]
    small_pages(fig, x + 62, 203, e.P, cells, "admitted")
    cells = ["admitted area"] * len(left) + ["admitted dashed"] * len(e.new)
    small_pages(fig, x + 62, PAGES_Y, e.P, cells, "admitted")
    fig.text(x, 223, f"{len(before)} held", "small")
    fig.text(x, PAGES_Y + 20, f"{len(left)} held", "small")
    fig.text(x, 292, "what is left moves together", "small soft")
    fig.text(end, 292, f"+ {len(e.new)} later", "end small admitted")


def draw_selection(fig, x, e):
    """The bounds of the full pages, and the pages that the query reads."""
    heading(fig, x, "3. selection", "what is read",
            (("chosen", "query", 68), ("not read, stays held", "gone", 0)))
    ring_pages = ceil_div(e.W, e.P)
    ring = x + 2
    row = ring + SMALL_STEP * ring_pages + 10           # where the full pages begin
    last = row + SMALL_STEP * len(e.bounds) + 14        # and the partial one
    draw_bounds(fig, x, ring, row, last, e)

    fig.text(ring + 25.5, 196, "ring", "middle small window")
    fig.text(row + SMALL_STEP * len(e.bounds) / 2 - 1.5, 196, "full pages", "middle small admitted")
    fig.text(last + 12, 196, "partial", "middle small admitted")
    small_pages(fig, ring, 203, e.P, ["window area"] * e.W, "window")
    read = [ring + SMALL_STEP * page + 12 for page in range(ring_pages)]
    for page in range(len(e.bounds)):
        left = row + SMALL_STEP * page
        if page in e.chosen:
            small_pages(fig, left, 203, e.P, ["admitted area"] * e.P, "admitted")
            fig.rect(left - 2, 201, 28, 7 * e.P + 7, "query line thick")
            read.append(left + 12)
        else:
            small_pages(fig, left, 203, e.P, ["gone area"] * e.P, "gone")
    held = len(e.left[0] + e.new)
    small_pages(fig, last, 203, e.P, ["admitted area"] * (held % e.P), "admitted")
    read.append(last + 12)
    draw_reads(fig, read, ring_pages + ceil_div(held, e.P))


def draw_bounds(fig, x, ring, row, last, e):
    """A bar above each full page; the ring and the partial page are read without one."""
    zero = gate_height(0)
    fig.text(x, 74, "bound: largest possible q · k,", "small soft")
    fig.text(x, 89, "from a page's min and max keys", "small soft")
    for page, bound in enumerate(e.bounds):
        y = gate_height(0.55 * bound / max(e.bounds))
        style = "query" if page in e.chosen else "gone"
        left = row + SMALL_STEP * page
        fig.rect(left + 4, y, 16, zero - y, style, 0)
        fig.text(left + 12, y - 5, f"{bound:.1f}", "middle small")
    fig.line([(ring, zero), (x + PART_WIDTH, zero)], "plain")
    fig.text(ring + 25.5, zero - 6, "always", "middle small")
    fig.text(last + 12, zero - 6, "always", "middle small")


def draw_reads(fig, read, num_pages):
    """From the query up to each page that it reads; read: the centers of these."""
    middle = (read[0] + read[-1]) / 2
    fork = 260                                          # the y of the line that all arrows leave
    fig.line([(middle, 276), (middle, fork), (read[0], fork)], "query line")
    fig.line([(middle, fork), (read[-1], fork)], "query line")
    for center in read:
        fig.arrow([(center, fork), (center, 240)], "query")
    fig.box(middle - 32, 276, 64, 28, "query", "query", "bold")
    fig.text(middle, 322, f"reads {len(read)} of {num_pages} pages", "middle small")
    fig.text(middle, 338, "the next query may choose others", "middle small soft")


def draw_budget(fig, x, rows, P, budget, label):
    """The pages of all rows side by side, the drawn row first, and where the budget ends."""
    fig.text(x, 318, label, "small")
    place = 0
    for row, tokens in enumerate(rows):
        for _ in range(ceil_div(len(tokens), P)):
            over = 6 if place >= budget else 0          # a gap for the mark
            style = "solid admitted" if row == 0 else "admitted"
            fig.rect(x + 9 * place + 5 * row + over, 327, 7, 10, style, 1)
            place += 1
    mark = x + 9 * budget + 5 * (len(rows) - 1) + 2
    fig.line([(mark, 323), (mark, 341)], "strong edge")
    fig.text(mark, 354, "budget", "middle small")
    fig.bracket(x, x + 9 * ceil_div(len(rows[0]), P) - 2, 342, "admitted", ends=-4)
    fig.text(x, 356, "this row", "small admitted")


# ------------------------------------------------------------------------------------ 6. training

TILES_X = 440               # the upper left corner of the tile map
TILES_Y = 62
TILE_STEP = 22              # from one of its tiles to the next


def training_example():
    """A small causal triangle in tiles, and one of its blocks of queries."""
    return Example(T=96, W=28, BM=8, BN=8, t0=40)


def draw_training(e):
    """The curve of the sparsity loss; and FAR, NEAR and EDGE tiles."""
    fig = Figure("training", 414, "The sparsity loss, and the tiles of the training kernels",
                 "Left: the cost 1 - (1 - g)^2 of a gate g, with slope 2 at 0 and slope 0 at 1, "
                 "and the straight line g. Right, queries down and keys across: a tile wholly "
                 "outside the window is FAR, one wholly inside it is NEAR, and one that the "
                 "diagonal or the window's edge runs through is EDGE.")
    draw_cost_curve(fig)
    draw_tile_map(fig, e)
    draw_query_block(fig, e)
    draw_tile_kinds(fig, tile_place(0, e.T, e)[1] + 24)
    fig.write()


def draw_cost_curve(fig):
    """1 - (1 - g)^2 with its tangents at both ends, above the line g."""
    x0, y0, side = 52, 62, 286

    def at(g, cost):
        return x0 + side * g, y0 + side * (1 - cost)

    def curve(g):
        return 1 - (1 - g) ** 2

    def slope(g):
        return 2 * (1 - g)

    fig.text(24, 24, "what a gate g adds to the sparsity loss", "bold")
    fig.line([at(0, 1.04), at(0, 0), at(1.04, 0)], "plain")
    for value in (0, 1):
        x, y = at(value, value)
        fig.text(x, y0 + side + 18, str(value), "small soft middle")
        fig.text(x0 - 8, y + 4, str(value), "small soft end")
    fig.text(x0 + side / 2, y0 + side + 18, "g", "middle bold")

    fig.line([at(0, 0), at(1, 1)], "gone dashed")
    for g, other in ((0, 0.36), (1, 0.5)):
        fig.line([at(g, curve(g)), at(other, curve(g) + slope(g) * (other - g))], "strong dashed")
    fig.line([at(g / 40, curve(g / 40)) for g in range(41)], "admitted line thick")

    x, y = at(0.47, 0.82)
    fig.text(x, y, "1 − (1 − g)²", "end bold admitted")
    x, y = at(0.6, 0.5)
    fig.text(x + 4, y, "the line g:", "soft")
    fig.text(x + 4, y + 17, "slope 1", "soft")
    x, y = at(0.24, 0.17)
    fig.text(x, y, f"slope {slope(0)} at g = 0:")
    fig.text(x, y + 17, "a small gate is pushed to 0", "soft")
    x, y = at(1, 1)
    fig.text(x, y - 10, f"slope {slope(1)} at g = 1: an open gate stays open", "end")


def key_tiles(t0, T, W, BM, BN):
    """kernels.key_tiles: the bounds (far, near, diagonal, stop) of queries t0 .. t0 + BM - 1."""
    far = max(t0 + 1 - W, 0) // BN * BN
    diagonal = (t0 + 1) // BN * BN
    near = ceil_div(max(t0 + BM - W, 0), BN) * BN
    return far, min(near, diagonal), diagonal, min(t0 + BM, T)


def tile_place(key, query, e):
    """Where a key and a query meet in the tile map."""
    return TILES_X + TILE_STEP / e.BN * key, TILES_Y + TILE_STEP / e.BM * query


def draw_tile_map(fig, e):
    """The causal triangle in tiles, each with the first letter of its kind."""
    def at(key, query):
        return tile_place(key, query, e)

    # Under the tiles: the window, and what is older.
    T = e.T
    fig.polygon([at(0, 0), at(T, T), at(T - e.W, T), at(0, e.W)], "window area")
    fig.polygon([at(0, e.W), at(T - e.W, T), at(0, T)], "admitted area")
    for t0 in range(0, T, e.BM):
        far, near, diagonal, stop = key_tiles(t0, T, e.W, e.BM, e.BN)
        for j0 in range(0, stop, e.BN):
            x, y = at(j0, t0)
            kind, style = "E", "strong edge"
            if j0 < far:
                kind, style = "F", "plain thin"
            elif near <= j0 < diagonal:
                kind, style = "N", "plain thin"
            fig.rect(x + 1, y + 1, 20, 20, style, 0)
            fig.text(x + 11, y + 15.3, kind, "middle small")

    left = TILES_X - 8
    fig.text(left, 24, "tiles of the training kernels", "bold")
    fig.text(TILES_X, TILES_Y - 10, "keys →", "small soft")
    fig.text(left, TILES_Y + 12, "queries ↓", "small soft end")
    fig.text(736, TILES_Y + 12, f"T = {T}, W = {e.W}", "end soft")
    fig.text(736, TILES_Y + 29, f"tiles of {e.BM} × {e.BN}", "end soft")


def draw_query_block(fig, e):
    """A frame around one block of queries, and the bounds of its tiles."""
    far, near, diagonal, stop = key_tiles(e.t0, e.T, e.W, e.BM, e.BN)
    x, y = tile_place(0, e.t0, e)
    end, _ = tile_place(stop, e.t0, e)
    fig.rect(x - 2, y - 2, end - x + 4, 26, "query line thick")
    x = end + 12
    fig.text(x, y - 20, f"queries {e.t0} … {e.t0 + e.BM - 1}: keys", "query bold")
    fig.text(x, y - 3, f"F [0, {far}), E [{far}, {near}),", "query")
    fig.text(x, y + 14, f"N [{near}, {diagonal}), E [{diagonal}, {stop})", "query")


def draw_tile_kinds(fig, y):
    """What the letters mean."""
    kinds = (("FAR", "outside the window: add log g, no mask"),
             ("NEAR", "inside it: nothing to add, no mask"),
             ("EDGE", "an edge runs through: the exact mask"))
    for place, (kind, meaning) in enumerate(kinds):
        fig.text(TILES_X - 8, y + 18 * place, kind, "bold")
        fig.text(TILES_X + 38, y + 18 * place, meaning, "soft")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()    # only --help
    draw_token(token_example())
    draw_pages(pages_example())
    draw_prefill(prefill_example())
    draw_decode(decode_example())
    draw_primitives(primitives_example())
    draw_training(training_example())
