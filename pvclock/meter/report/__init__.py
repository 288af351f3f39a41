"""What was measured, as one page to look at: sections of plots, tables and sentences, drawn as HTML and SVG."""
