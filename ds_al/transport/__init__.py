"""Messages between neighbouring stages: channels, layouts, wire formats, an artificial slow link."""
