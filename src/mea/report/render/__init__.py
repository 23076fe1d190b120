"""Parts of a section as HTML, Markdown, CSV, SVG and terminal text."""
