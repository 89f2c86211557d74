"""Tables of docs/performance.md, each between a line that names its command and an end line."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/performance.md"
MARK_END = "<!-- end of table -->"


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write(name, text):
    """Puts `text` in the place of the table that is marked with `name`."""
    begin = f"<!-- table: {name} -->"
    page = PAGE.read_text()
    if begin not in page:
        raise SystemExit(f"{PAGE} has no line '{begin}': put it, and '{MARK_END}' below it, where "
                         "the table belongs")
    before, rest = page.split(begin, 1)
    after = rest.split(MARK_END, 1)[1]
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{MARK_END}{after}")
