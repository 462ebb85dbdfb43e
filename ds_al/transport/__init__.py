"""Messages between neighbouring stages: channels, layouts, compression, an artificial slow link."""
