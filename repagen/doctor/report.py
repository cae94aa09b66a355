"""What checks found, as lines for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from repagen.errors import UserError, one_line

Level = Literal["ok", "note", "problem"]
_MARKS: dict[Level, str] = {"ok": " ", "note": "-", "problem": "!"}


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: what was looked at.
        text: what was found, in one line.
        level: `ok`; `note` for what a user should know; `problem` for what must be repaired.
        details: further lines, such as the names of broken files.
        facts: the same as JSON-able values.
    """

    name: str
    text: str
    level: Level = "ok"
    details: Sequence[str] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """Findings about one subject."""

    title: str
    findings: Sequence[Finding]


@dataclass(frozen=True)
class Report:
    """All that was found."""

    sections: Sequence[Section]

    @property
    def problems(self) -> list[Finding]:
        """Findings that must be repaired."""
        return [finding for section in self.sections for finding in section.findings if finding.level == "problem"]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        sections = {
            section.title: [
                {
                    "name": finding.name,
                    "level": finding.level,
                    "text": finding.text,
                    "details": list(finding.details),
                    **({"facts": finding.facts} if finding.facts else {}),
                }
                for finding in section.findings
            ]
            for section in self.sections
        }
        return {"problems": len(self.problems), "sections": sections}

    def text(self) -> str:
        """Return the report as lines; `!` marks problems, `-` what is worth knowing."""
        lines = []
        for section in self.sections:
            width = max((len(finding.name) for finding in section.findings), default=0)
            lines += [section.title]
            for finding in section.findings:
                lines.append(f"{_MARKS[finding.level]} {finding.name:<{width}}  {finding.text}")
                lines += [f"  {'':<{width}}    {detail}" for detail in finding.details]
            lines.append("")
        count = len(self.problems)
        found = "no problem found" if not count else f"{count} problem{'s' * (count > 1)}, marked with !"
        return "\n".join([*lines, found])


def findings_of(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return what a check finds; whatever ends it early is a problem, too, and the report goes on."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:
        cause = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
        found.append(Finding(name, cause, "problem"))
    return found


def readable_size(size: float) -> str:
    """Return a number of bytes in a readable unit."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
