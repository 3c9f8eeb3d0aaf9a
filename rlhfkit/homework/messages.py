"""What the learner reads: plain text in a terminal, the same words as HTML in a notebook."""

from __future__ import annotations

import html
import sys
from dataclasses import dataclass, field

from rlhfkit.homework.comparisons import shorten
from rlhfkit.homework.core import Question, Verdict


@dataclass
class Message:
    """Lines of (tag, text): the tag is a word such as PASS, so that colour is never the only cue."""

    title: str
    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, tag: str, text: str) -> None:
        """Append a line; what cannot be encoded becomes a question mark."""
        self.lines.append((tag, text.encode("utf-8", "replace").decode("utf-8")))

    def add_code(self, text: str) -> None:
        """Append lines to be shown as they are, in a fixed-width font."""
        self.lines.append(("CODE", text))

    def text(self) -> str:
        """For a terminal."""
        rows = [self.title]
        for tag, text in self.lines:
            if tag == "CODE":
                rows += ["", *(f"    {line}".rstrip() for line in text.splitlines()), ""]
                continue
            rows += [f"  {tag}  {text}" if tag else f"        {part}" for part in (text.splitlines() or [""])]
        return "\n".join(rows)

    def as_html(self) -> str:
        """For a notebook: colours that hold on light and dark pages, no background."""
        colours = {"PASS": "#2e8b57", "FAIL": "#d1495b", "LIKELY CAUSE": "#c77700"}
        rows = []
        for tag, text in self.lines:
            body = "<br>".join(html.escape(part) for part in text.splitlines())
            if tag == "CODE":
                rows.append(f'<pre style="line-height:1.3;margin:0.5em 0">{html.escape(text)}</pre>')
            elif tag:
                style = f"color:{colours[tag]};" if tag in colours else ""
                rows.append(f'<div><b style="{style}white-space:pre">{html.escape(tag)}</b>&ensp;{body}</div>')
            else:
                rows.append(f'<div style="margin-left:3.5em">{body}</div>')
        return f'<div style="line-height:1.5"><b>{html.escape(self.title)}</b>{"".join(rows)}</div>'

    def tell(self) -> None:
        """Show it: as HTML in a notebook, as text elsewhere."""
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        if getattr(shell, "kernel", None) is None:
            print(self.text())
            return
        from IPython.display import display

        display({"text/plain": self.text(), "text/html": self.as_html()}, raw=True)


def checked(question: Question, verdicts: list[Verdict], matches: list[str]) -> Message:
    """The report of one check."""
    got = sum(case.points for case, v in zip(question.cases, verdicts, strict=False) if v.passed)
    message = Message(f"{question.id}  {question.title}: {got}/{question.points}")
    if verdicts[0].blank and len(verdicts) == 1:
        message.add("FAIL", verdicts[0].message)
        return message
    problems = {v.message for v in verdicts}
    if len(problems) == 1 and not verdicts[0].passed and len(verdicts) > 1:
        message.add("FAIL", f"all {len(verdicts)} cases: {verdicts[0].message}")
    else:
        for case, verdict in zip(question.cases, verdicts, strict=True):
            points = f"({case.points} pt)"
            message.add("PASS" if verdict.passed else "FAIL", f"{case.name} {points}")
            if not verdict.passed:
                message.add("", f"{verdict.message}\nhint: {case.hint}")
    if len(matches) == 1:
        says = next(wrong.says for wrong in question.wrongs if wrong.name == matches[0])
        message.add("LIKELY CAUSE", says)
    printed = next((v.printed for v in verdicts if v.printed.strip() and not v.passed), "")
    if printed:
        first = "\n".join(shorten(line, 100) for line in printed.splitlines()[:8])
        message.add("", f"your code printed:\n{first}")
    return message


def bar(share: float, width: int = 10) -> str:
    """A bar of ``width`` characters, full only if ``share`` is 1."""
    full = int(width * min(max(share, 0.0), 1.0) + 1e-9)
    return "#" * full + "." * (width - full)
