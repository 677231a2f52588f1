"""The README's six drawings of the mechanism: `python assets/figures.py` writes assets/*.svg.

    token.svg       a token's life: the ring, the gate, and then a page or nothing
    pages.svg       two rows of very different lengths in one page pool
    prefill.svg     what one block of queries reads in prefill
    decode.svg      how decode's work is split among programs, and combined again
    primitives.svg  one row's tokens under admission, eviction and selection
    training.svg    the curve of the sparsity loss, and the tiles of the training kernels

Standard library only. Each function first works out a small example by the rules of wgkv.py and
kernels.py, and then draws it, so the numbers in a drawing are computed. Coordinates are px of a
page that is 760 wide; y grows downwards. A color means the same in all drawings: see COLORS.
"""
import argparse
import math
import random
from html import escape
from pathlib import Path

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

def token():
    """One row after 14 tokens, and what happens when the next one arrives."""
    window, page_size, tau = 8, 4, 0.1
    gates = [0.98, 0.02, 0.05, 0.64, 0.01, 0.03, 0.31, 0.04, 0.02, 0.87, 0.06, 0.03, 0.02, 0.05]

    # Token t takes place t mod W. The token that was there leaves, and only now its gate counts.
    ring, promoted, gone = {}, [], []
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

    fig = Figure("token", 392, "A token's life",
                 f"Token {new} takes place {new} mod {window} = {place} of a ring of {window}. "
                 f"Token {leaving}, which was there, leaves the window. Its gate is at least tau = "
                 f"{tau}, so it is copied to the row's page, behind tokens {promoted}. Tokens "
                 f"{gone} had smaller gates and are gone. A query sees the ring and the pages.")
    draw_ring(fig, 180, 220, ring, gates, tau, place)
    fig.text(24, 30, "g: the gate of a token", "small soft")
    fig.text(24, 47, "g ≥ tau: admitted", "small bold admitted")

    # The new token comes in from above; the one whose place it takes leaves to the right.
    fig.box(192, 20, 112, 32, f"new token {new}", "window", "bold")
    fig.arrow([(248, 52), (248, 115)], "window")
    fig.text(259, 88, f"takes place {new} mod {window} = {place}")
    fig.arrow([(290, 160), (362, 160)], "plain")
    fig.text(330, 178, f"{leaving} leaves", "small soft middle")
    fig.polygon([(364, 160), (428, 124), (492, 160), (428, 196)], "plain")
    fig.text(428, 159, "gate ≥ tau?", "middle")
    fig.text(428, 175, f"tau = {tau}", "small soft middle")

    # No: gone. Yes: behind the promoted tokens of its row.
    fig.arrow([(492, 160), (552, 160)], "plain")
    fig.text(520, 152, "no", "middle bold")
    fig.text(558, 131, "gone", "bold")
    fig.text(602, 131, "place overwritten", "soft")
    for place, t in enumerate(gone):
        fig.box(558 + 43 * place, 142, 38, 36, str(t), "gone dashed", "soft")
    fig.arrow([(428, 196), (428, 262), (552, 262)], "admitted")
    fig.text(440, 232, "yes", "bold")
    fig.text(558, 233, "page", "bold")
    fig.text(602, 233, f"P = {page_size} tokens here", "soft")
    for place in range(page_size):
        x = 558 + 43 * place
        if place < len(promoted):
            fig.box(x, 244, 38, 36, str(promoted[place]), "admitted", "bold")
        elif place == len(promoted):
            fig.box(x, 244, 38, 36, str(leaving), "admitted dashed", "admitted bold")
        else:
            fig.rect(x, 244, 38, 36, "gone dashed")

    # The query sees both.
    fig.box(396, 328, 64, 32, "query", "query", "bold")
    fig.text(428, 380, "sees the ring, now with 14, and the page", "small soft middle")
    fig.arrow([(396, 344), (346, 344), (298, 272)], "query")
    end = 558 + 43 * (len(promoted) + 1) - 5
    fig.bracket(558, end, 292, "query", ends=-6)
    fig.arrow([(460, 344), ((558 + end) / 2, 344), ((558 + end) / 2, 294)], "query")
    fig.write()


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


def pages():
    """A row of 120 tokens and a row of 40,000: page tables, pool and free stack."""
    W, P = 128, 64
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

    fig = Figure("pages", 440, "Two rows in one page pool",
                 f"Row one has {tokens[0]} tokens, all in its ring of {R} pages. Row two has "
                 f"{tokens[1]:,} tokens: {R} ring pages and {promoted_pages} pages of promoted "
                 f"tokens, the last with {partial} of {P} slots in use. Each row's page table "
                 "lists its pages in the common pool. Unused entries are 0, the dummy page. Free "
                 "pages are on a stack.")

    # The pool. One px of a page's height is one slot.
    top = 176
    last = tables[1][-1]
    center = {}
    for place, page in enumerate([*range(12), *range(last, pool_size)]):
        x = 24 + 42 * place + (44 if page >= last else 0)
        center[page] = x + 19
        if page in held:
            color, slots = held[page]
            fig.rect(x, top, 38, slots, f"{color} area", 1)
            fig.rect(x, top, 38, P, f"{color} line")
            fig.text(x + 19, top + 37, str(page), "middle bold")
        else:
            fig.rect(x, top, 38, P, "gone" if page == 0 else "gone dashed")
            fig.text(x + 19, top + 37, str(page), "middle soft")
            fig.text(x + 19, top - 8, "dummy" if page == 0 else "free", "middle small soft")
    fig.text(550, top + 37, "…", "middle bold")
    fig.text(center[last] + 19, top - 8, f"{partial} of {P}", "end small admitted")
    fig.text(736, 138, f"one pool; a page has P = {P} slots", "end bold")

    for table, y, pool_edge in ((tables[0], 52, top), (tables[1], 318, top + P)):
        page_table(fig, table, R, len(tables[1]), y, pool_edge, center)
    fig.text(274, 98, "unused: 0, the dummy page", "middle small soft")
    fig.text(474, 52, f"row one: {tokens[0]} tokens", "bold")
    fig.text(474, 70, f"all in its window of W = {W},", "soft")
    fig.text(474, 87, "nothing promoted yet", "soft")
    fig.text(474, 322, f"row two: {tokens[1]:,} tokens", "bold")
    fig.text(474, 340, f"{counts[1]:,} promoted: {promoted_pages - 1} whole pages,", "soft")
    fig.text(474, 357, f"and {partial} tokens in a partial page", "soft")

    # The free stack, all of it.
    fig.text(24, 413, "free stack", "bold")
    for place, page in enumerate(free):
        fig.box(108 + 42 * place, 394, 38, 28, str(page), "gone dashed", "soft")
    end = 108 + 42 * len(free)
    fig.arrow([(end + 42, 408), (end + 2, 408)], "plain")
    fig.text(end + 50, 404, "top: the next page that a row gets", "soft")
    ids = ", ".join(str(page) for page in free[-freed:])
    fig.text(end + 50, 421, f"({ids} came back from an older text)", "small soft")
    fig.write()


def page_table(fig, table, R, columns, y, pool_edge, center):
    """One row's page table at y, with an arrow from each entry to the edge of its page."""
    above = y < pool_edge
    fig.text(24, y + 12, "page", "small soft")
    fig.text(24, y + 26, "table", "small soft")
    shown = [*range(R + 4), columns - 1, columns]
    for place, column in enumerate(shown):
        x = 66 + 42 * place + (44 if column > R + 3 else 0)
        fig.text(x + 19, y - 9 if above else y + 44, str(column), "middle small soft")
        if column >= len(table):
            fig.box(x, y, 38, 28, "0", "gone", "soft")
            continue
        color = "window" if column < R else "admitted"
        page = table[column]
        fig.box(x, y, 38, 28, str(page), color)
        if above:
            fig.arrow([(x + 19, y + 28), (center[page], pool_edge - 2)], color)
        else:
            fig.arrow([(x + 19, y), (center[page], pool_edge + 3)], color)
    fig.text(340, y + 19, "…", "middle bold")
    if above:                               # what the columns are, said once
        middle = 66 + 42 * R - 2            # between the ring's entries and the others
        fig.bracket(66, middle - 2, 25, "window")
        fig.text((64 + middle) / 2, 17, f"ring, R = {R}", "middle window")
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


def prefill():
    """One block of queries: in the T x T triangle, and as memory sees it."""
    T, W, P = 6000, 256, 64
    t0 = 5000 // P * P                                  # the block of P queries around 5,000
    t1 = t0 + P
    runs = admitted_runs(T, share=0.2, seed=75)

    # As in kernels.prefill_kernel: first the pages, with what is older than the first query's
    # window, and then the band, from where that window begins to the last query itself.
    band_start = t0 - W + 1
    num_old = sum(max(0, min(end, band_start) - first) for first, end in runs)
    num_pages = ceil_div(num_old, P)
    band_keys = t1 - band_start
    band_tiles = ceil_div(band_keys, P)
    dense_tiles = ceil_div(t1, P)

    fig = Figure("prefill", 476, "What a block of queries reads in prefill",
                 "Above, the causal triangle: vertical stripes are admitted keys, the slash is the "
                 f"window, and the queries {t0:,} to {t1 - 1:,} are highlighted. Below, the keys "
                 f"that they read: {num_old} admitted ones in {num_pages} pages, then a band of "
                 f"{band_keys} keys in {band_tiles} tiles with the exact mask. Dense attention "
                 f"would read {dense_tiles} tiles.")
    share = round(100 * num_old / band_start)
    triangle(fig, T, W, runs, t0, t1, f"stripes: admitted keys, {share}%")
    tile_counts(fig, P, dense_tiles, num_pages, band_tiles)

    # The block's keys in memory: half a px a key, three quarters of one a query.
    left, top, height = 46, 392, 0.75 * P
    right = left + 34 * num_pages - 2
    below = top + height + 20
    fig.text(left, top - 22, f"pages: {num_old} admitted keys, older than the window", "admitted")
    fig.bracket(left, right, top - 13, "admitted")
    for page in range(num_pages):
        x = left + 34 * page
        held = min(P, num_old - page * P)
        fig.rect(x, top, held / 2, height, "admitted area", 0)
        fig.rect(x, top, P / 2, height, "admitted line", 0)
        fig.text(x + P / 4, top + height / 2 + 4.5, str(page), "middle")
    fig.text(left, below, "no mask: every query of the block sees them", "soft")
    fig.text(right, below, f"the last: {num_old - (num_pages - 1) * P} of {P}", "end soft")

    x = right + 26
    fig.text(x, top - 22, f"band: {band_keys} keys", "window")
    fig.bracket(x, x + band_keys / 2, top - 13, "window")
    band(fig, x, top, W, P, band_tiles, band_start, runs)
    fig.text(x, below, "exact mask, key by key", "soft")

    # From the block in the triangle to the block in memory.
    y = 24 + 0.05 * (t0 + t1) / 2
    middle = top + height / 2
    fig.line([(88, y), (20, y), (20, middle), (left - 12, middle)], "query line")
    fig.line([(left - 5, top), (left - 12, top), (left - 12, top + height),
              (left - 5, top + height)], "query line")
    fig.write()


def triangle(fig, T, W, runs, t0, t1, stripes):
    """Which keys (across) each query (down) sees, 20 tokens a px; and what is what."""
    def at(key, query):
        return 92 + 0.05 * key, 24 + 0.05 * query

    fig.polygon([at(0, 0), at(T, T), at(0, T)], "gone area")
    for first, end in runs:
        fig.polygon([at(first, first), at(end, end), at(end, T), at(first, T)], "solid admitted")
    fig.polygon([at(0, 0), at(T, T), at(T - W, T), at(0, W)], "solid window")
    x, y = at(0, t0)
    fig.rect(x - 3, y - 3, 0.05 * t1 + 6, 0.05 * (t1 - t0) + 6, "query line thick")
    fig.text(92, 16, "keys →", "small soft")
    fig.text(84, 34, "queries ↓", "small soft end")
    fig.text(84, 24 + 0.05 * T, f"T = {T:,}", "small soft end")

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
        return x0 + key / 2, y0 + 0.75 * query

    fig.polygon([at(0, 0), at(W, 0), at(W + P, P), at(P, P)], "window area")
    for first, end in runs:                 # admitted keys that later queries have left behind
        first = max(first - band_start, 0)
        end = min(end - band_start, P)
        if first < end:
            fig.polygon([at(first, first), at(end, end), at(end, P), at(first, P)],
                        "solid admitted")
    for tile in range(tiles):
        fig.rect(x0 + P / 2 * tile, y0, P / 2, 0.75 * P, "window line", 0)


# -------------------------------------------------------------------------------------- 4. decode

def decode():
    """Three rows of tiles over four programs: the example of kernels.py, divided by its rules."""
    rows = (5, 1, 6)                                    # tiles of each
    programs = 4
    total = sum(rows)
    starts = [sum(rows[:row]) for row in range(len(rows))]

    # Program p takes the tiles from total * p // programs up to the next program's first. Where a
    # row ends inside its share, the share has two parts: (program, row, first tile, end).
    parts = []
    for program in range(programs):
        tile = total * program // programs
        end = total * (program + 1) // programs
        while tile < end:
            row = max(row for row in range(len(rows)) if starts[row] <= tile)
            stop = min(end, starts[row] + rows[row])
            parts.append((program, row, tile, stop))
            tile = stop

    longest = max(rows)
    share = ceil_div(total, programs)
    fig = Figure("decode", 376, "How decode's work is split and combined",
                 f"The {total} tiles of {len(rows)} rows form one list, and {programs} programs "
                 f"take {share} each. A row in two programs' shares has two partial results, and "
                 "the program that arrives last combines them. On the right, time: with one "
                 f"program per row the longest takes {longest} tiles, with even shares {share}.")

    def color(tile):                                   # first the ring, here one page, W <= P
        return "window" if tile in starts else "admitted"

    # The list of tiles, with a gap between two programs' shares.
    x_of = {}
    for program, row, first, stop in parts:
        for tile in range(first, stop):
            x_of[tile] = 24 + 32 * tile + 10 * program
            fig.box(x_of[tile], 40, 30, 30, str(tile), color(tile))
    for row, tiles in enumerate(rows):
        left = x_of[starts[row]]
        right = x_of[starts[row] + tiles - 1] + 30
        fig.bracket(left + 1, right - 1, 29, "plain")
        fig.text((left + right) / 2, 22, f"row {row}", "middle bold")
    for program in range(programs):
        left = x_of[total * program // programs]
        right = x_of[total * (program + 1) // programs - 1] + 30
        fig.bracket(left, right, 82, "plain", ends=-6)
        fig.text((left + right) / 2, 100, f"program {program}", "middle")
    combining(fig, parts, x_of)

    # The same tiles in time, where each takes equally long.
    by_row = [range(start, start + tiles) for start, tiles in zip(starts, rows)]
    by_share = [range(total * p // programs, total * (p + 1) // programs) for p in range(programs)]
    timeline(fig, 22, "one program per row", by_row, color)
    timeline(fig, 176, "even shares", by_share, color)

    fig.text(24, 364, "a tile is one page:", "small soft")
    fig.rect(142, 353, 13, 13, "window")
    fig.text(161, 364, "the ring", "small soft")
    fig.rect(222, 353, 13, 13, "admitted")
    fig.text(241, 364, "promoted tokens", "small soft")
    fig.text(490, 364, "m, l, o: maximum, sum, weighted values", "small soft")
    fig.write()


def combining(fig, parts, x_of):
    """From each program's part of a row to the row's output."""
    for row in sorted({row for _, row, _, _ in parts}):
        mine = [part for part in parts if part[1] == row]
        centers = [(x_of[first] + x_of[stop - 1] + 30) / 2 for _, _, first, stop in mine]
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


def timeline(fig, y, title, lanes, color):
    """When each program is at work; lanes: the tiles of each."""
    left = 560
    fig.text(490, y, title, "bold")
    for program, tiles in enumerate(lanes):
        top = y + 14 + 26 * program
        fig.text(490, top + 16, f"program {program}", "small soft")
        for step, tile in enumerate(tiles):
            fig.box(left + 28 * step, top, 26, 22, str(tile), color(tile), "small")
    longest = max(len(tiles) for tiles in lanes)
    end = left + 28 * longest + 1
    bottom = y + 16 + 26 * len(lanes)
    fig.line([(end, y + 8), (end, bottom)], "strong")
    fig.text(end, bottom + 16, f"{longest} tiles of time", "end bold")


# ------------------------------------------------------------------- 5. three primitives, one row

def primitives():
    """One row of a small cache: what is written, what a budget removes, what a step reads."""
    W, P, tau, sinks = 8, 4, 0.1, 4
    budget = 20                         # pages of promoted tokens, over all rows
    most_selected = 3                   # of a row's pages of promoted tokens, for a decode step
    # The gates of four rows that share the budget. The first row is drawn.
    gates = [[0.99, 0.06, 0.24, 0.03, 0.71, 0.02, 0.31, 0.88, 0.04, 0.17, 0.93,
              0.05, 0.28, 0.01, 0.78, 0.43, 0.03, 0.64, 0.97, 0.07, 0.02, 0.21,
              0.83, 0.46, 0.04, 0.90, 0.26, 0.05, 0.58, 0.02, 0.75, 0.95, 0.41,
              0.04, 0.88, 0.19, 0.03, 0.69, 0.05, 0.27, 0.02, 0.86, 0.06, 0.04]]
    rng = random.Random(57)
    for share in (0.5, 0.2, 0.8):
        gates.append([1 - (1 - tau) * rng.random() ** 2 if rng.random() < share
                      else rng.uniform(0, tau) for _ in gates[0]])

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
    chosen = best_first[:most_selected - (partial > 0)]

    before, after = pages_of(held, P), pages_of(left, P)
    fig = Figure("primitives", 362, "Admission, eviction and selection in one row",
                 f"Admission: {leaving} tokens have left the ring. {len(held[0])} had a gate of at "
                 f"least tau = {tau} and were promoted to {pages_of(held[:1], P)} pages; the "
                 f"others were refused and are gone. Eviction: the promoted tokens of all rows "
                 f"take {before} pages, and the budget is {budget}. Those with the lowest gates "
                 f"are evicted until {after} pages are left. So tau rises to {cut:.2f}, and later "
                 f"tokens need that. This row loses {len(held[0]) - len(left[0])} tokens, none of "
                 f"its first {sinks}; the others move together. Selection: a decode step reads "
                 f"the ring, the partial page, and of {full} full pages the {len(chosen)} with the "
                 f"largest bounds on q . k. The other pages stay.")
    draw_admission(fig, 24, gates[0], held[0], leaving, tau, W, P)
    draw_eviction(fig, 268, gates[0], held[0], left[0], new, tau, cut, sinks, W, P)
    draw_selection(fig, 512, len(left[0] + new), bounds, chosen, W, P)
    draw_budget(fig, 24, held, P, budget, f"all rows: {before} pages, the budget is {budget}")
    draw_budget(fig, 268, left, P, budget, f"all rows' lowest gates go: {after} pages, 90%")
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
    fig.text(x + 224, 22, meaning, "end soft")
    fig.line([(x, 30), (x + 224, 30)], "plain")
    for word, style, width in words:
        fig.rect(x + 0.5, 40, 9, 9, style, 0)
        fig.text(x + 15, 49, word, "small")
        x += width


def gate_height(g):
    """The y of a gate in the plots."""
    return 170 - 102 * g


def gate_plot(fig, x, gates, styles):
    """A bar for each gate that has a style. Returns where they begin, and the end."""
    step = (224 - 30) / len(gates)
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
    """Pages side by side, 27 px each, filled from the top down; cells: a style for each token."""
    for place, style in enumerate(cells):
        page, slot = divmod(place, P)
        fig.rect(x + 27 * page + 2, y + 2 + 7 * slot, 20, 6, style, 0)
    for page in range(ceil_div(len(cells), P)):
        fig.rect(x + 27 * page, y, 24, 7 * P + 3, f"{color} line")


def draw_admission(fig, x, gates, promoted, leaving, tau, W, P):
    """Gates from tau on and below it, and those of the ring's tokens, which do not count yet."""
    heading(fig, x, "1. admission", "what is written",
            (("admitted", "solid admitted", 76), ("refused", "solid gone", 70),
             ("in the ring", "solid window", 0)))
    styles = ["solid admitted" if g >= tau else "solid gone" for g in gates[:leaving]]
    edges = gate_plot(fig, x, gates, styles + ["solid window"] * W)
    threshold(fig, edges[0], edges[leaving], tau, "tau")        # not for the ring's tokens yet
    fig.bracket(edges[0], edges[leaving] - 2, 180, "plain", ends=-5)
    fig.bracket(edges[leaving] + 1, edges[-1], 180, "window", ends=-5)
    fig.text((edges[0] + edges[leaving]) / 2, 196, f"{leaving} have left the ring", "middle small")
    fig.text((edges[leaving] + edges[-1]) / 2, 196, "ring", "middle small window")

    # Below: where the tokens of the plot are now.
    fig.arrow([(x + 12, 202), (x + 12, 238)], "admitted")
    fig.text(x + 23, 224, f"{len(promoted)} promoted", "small bold admitted")
    fig.text(x + 224, 224, f"{leaving - len(promoted)} refused: gone", "end small soft")
    small_pages(fig, x, 245, P, ["admitted area"] * len(promoted), "admitted")
    small_pages(fig, x + 224 - 27 * ceil_div(W, P) + 3, 245, P, ["window area"] * W, "window")
    fig.text(x, 292, f"one row: pages of {P} tokens", "small soft")
    fig.text(x + 224, 292, "its ring", "end small soft")


def draw_eviction(fig, x, gates, before, left, new, tau, cut, sinks, W, P):
    """The held tokens that tau' lets go, and how those that are left move together."""
    heading(fig, x, "2. eviction", "what is removed",
            (("held", "solid admitted", 54), ("evicted", "gone", 66), ("refused", "solid gone", 0)))
    leaving = len(gates) - W
    styles = [""] * leaving + ["solid gone"] * W        # what was refused before is gone
    for t in before:
        styles[t] = "gone"
    for t in left + new:
        styles[t] = "solid admitted"
    # Between tau and tau' lies what goes, unless it is a sink. Later tokens there are refused.
    y = gate_height(cut)
    fig.rect(x + 30, y, 194, gate_height(tau) - y, "gone area", 0)
    edges = gate_plot(fig, x, gates, styles)
    fig.line([(edges[0], gate_height(tau)), (edges[-1], gate_height(tau))], "plain dashed")
    fig.text(x + 25, gate_height(tau) + 5, "tau", "end small soft")
    threshold(fig, edges[0], edges[-1], cut, "tau′")
    fig.bracket(edges[0], edges[sinks] - 1, 180, "plain", ends=-5)
    fig.bracket(edges[leaving] + 1, edges[-1], 180, "plain", ends=-5)
    fig.text(x + 10, 196, f"first {sinks} stay (sinks)", "small")
    fig.text(edges[-1], 196, "later: need tau′", "end small")

    # The row's pages before and after. Dashed: the later tokens that reached tau'.
    cells = ["admitted area" if t in left else "gone" for t in before]
    small_pages(fig, x + 62, 203, P, cells, "admitted")
    cells = ["admitted area"] * len(left) + ["admitted dashed"] * len(new)
    small_pages(fig, x + 62, 245, P, cells, "admitted")
    fig.text(x, 223, f"{len(before)} held", "small")
    fig.text(x, 265, f"{len(left)} held", "small")
    fig.text(x, 292, "what is left moves together", "small soft")
    fig.text(edges[-1], 292, f"+ {len(new)} later", "end small admitted")


def draw_selection(fig, x, held, bounds, chosen, W, P):
    """The bounds of the full pages, and the pages that the query reads."""
    heading(fig, x, "3. selection", "what is read",
            (("chosen", "query", 68), ("not read, stays held", "gone", 0)))
    ring = x + 2
    row = ring + 27 * ceil_div(W, P) + 10               # where the full pages begin
    last = row + 27 * len(bounds) + 14                  # and the partial one
    fig.text(x, 74, "bound: largest possible q · k,", "small soft")
    fig.text(x, 89, "from a page's min and max keys", "small soft")
    for page, bound in enumerate(bounds):
        y = gate_height(0.55 * bound / max(bounds))
        style = "query" if page in chosen else "gone"
        fig.rect(row + 27 * page + 4, y, 16, gate_height(0) - y, style, 0)
        fig.text(row + 27 * page + 12, y - 5, f"{bound:.1f}", "middle small")
    fig.line([(ring, gate_height(0)), (x + 224, gate_height(0))], "plain")
    fig.text(ring + 25.5, gate_height(0) - 6, "always", "middle small")
    fig.text(last + 12, gate_height(0) - 6, "always", "middle small")

    fig.text(ring + 25.5, 196, "ring", "middle small window")
    fig.text(row + 27 * len(bounds) / 2 - 1.5, 196, "full pages", "middle small admitted")
    fig.text(last + 12, 196, "partial", "middle small admitted")
    small_pages(fig, ring, 203, P, ["window area"] * W, "window")
    read = [ring + 27 * page + 12 for page in range(ceil_div(W, P))]
    for page in range(len(bounds)):
        left = row + 27 * page
        if page in chosen:
            small_pages(fig, left, 203, P, ["admitted area"] * P, "admitted")
            fig.rect(left - 2, 201, 28, 7 * P + 7, "query line thick")
            read.append(left + 12)
        else:
            small_pages(fig, left, 203, P, ["gone area"] * P, "gone")
    small_pages(fig, last, 203, P, ["admitted area"] * (held % P), "admitted")
    read.append(last + 12)

    # From the query up to each page that it reads.
    middle = (read[0] + read[-1]) / 2
    fig.line([(middle, 276), (middle, 260), (read[0], 260)], "query line")
    fig.line([(middle, 260), (read[-1], 260)], "query line")
    for center in read:
        fig.arrow([(center, 260), (center, 240)], "query")
    fig.box(middle - 32, 276, 64, 28, "query", "query", "bold")
    pages = ceil_div(W, P) + ceil_div(held, P)
    fig.text(middle, 322, f"reads {len(read)} of {pages} pages", "middle small")
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

def training():
    """The curve of the sparsity loss; and FAR, NEAR and EDGE tiles."""
    fig = Figure("training", 414, "The sparsity loss, and the tiles of the training kernels",
                 "Left: the cost 1 - (1 - g)^2 of a gate g, with slope 2 at 0 and slope 0 at 1, "
                 "and the straight line g. Right, queries down and keys across: a tile wholly "
                 "outside the window is FAR, one wholly inside it is NEAR, and one that the "
                 "diagonal or the window's edge runs through is EDGE.")
    cost_curve(fig)
    tile_map(fig)
    fig.write()


def cost_curve(fig):
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


def tile_map(fig):
    """The causal triangle of a small example in tiles, and the bounds of one block of queries."""
    T, W, BM, BN = 96, 28, 8, 8
    x0, y0, scale = 440, 62, 22 / BN                    # 22 px a tile

    def at(key, query):
        return x0 + scale * key, y0 + scale * query

    # Under the tiles: the window, and what is older.
    fig.polygon([at(0, 0), at(T, T), at(T - W, T), at(0, W)], "window area")
    fig.polygon([at(0, W), at(T - W, T), at(0, T)], "admitted area")
    for t0 in range(0, T, BM):
        far, near, diagonal, stop = key_tiles(t0, T, W, BM, BN)
        for j0 in range(0, stop, BN):
            x, y = at(j0, t0)
            kind, style = "E", "strong edge"
            if j0 < far:
                kind, style = "F", "plain thin"
            elif near <= j0 < diagonal:
                kind, style = "N", "plain thin"
            fig.rect(x + 1, y + 1, 20, 20, style, 0)
            fig.text(x + 11, y + 15.3, kind, "middle small")

    fig.text(x0 - 8, 24, "tiles of the training kernels", "bold")
    fig.text(x0, y0 - 10, "keys →", "small soft")
    fig.text(x0 - 8, y0 + 12, "queries ↓", "small soft end")
    fig.text(736, y0 + 12, f"T = {T}, W = {W}", "end soft")
    fig.text(736, y0 + 29, f"tiles of {BM} × {BN}", "end soft")

    # One block of queries.
    t0 = 40
    far, near, diagonal, stop = key_tiles(t0, T, W, BM, BN)
    x, y = at(0, t0)
    fig.rect(x - 2, y - 2, scale * stop + 4, 26, "query line thick")
    x += scale * stop + 12
    fig.text(x, y - 20, f"queries {t0} … {t0 + BM - 1}: keys", "query bold")
    fig.text(x, y - 3, f"F [0, {far}), E [{far}, {near}),", "query")
    fig.text(x, y + 14, f"N [{near}, {diagonal}), E [{diagonal}, {stop})", "query")

    y = y0 + scale * T + 24
    for place, (kind, meaning) in enumerate((
            ("FAR", "outside the window: add log g, no mask"),
            ("NEAR", "inside it: nothing to add, no mask"),
            ("EDGE", "an edge runs through: the exact mask"))):
        fig.text(x0 - 8, y + 18 * place, kind, "bold")
        fig.text(x0 + 38, y + 18 * place, meaning, "soft")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()    # only --help
    token()
    pages()
    prefill()
    decode()
    primitives()
    training()
