"""Reports on runs: reads run folders, compares runs, and writes an HTML page or a Markdown file."""

from __future__ import annotations

from ds_al.figures.markdown import write_markdown
from ds_al.figures.page import write_page
from ds_al.report.compare import comparability
from ds_al.report.content import content
from ds_al.report.read import Profile, RunRecord, read

__all__ = ["Profile", "RunRecord", "comparability", "content", "read", "write_markdown", "write_page"]
