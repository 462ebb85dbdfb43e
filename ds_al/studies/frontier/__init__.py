"""The frontier: what accuracy K AL layers keep, and what time and memory they save."""
