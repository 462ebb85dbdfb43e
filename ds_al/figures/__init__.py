"""Parts of tables, charts and pages, and their output as Markdown, HTML and PNG."""
