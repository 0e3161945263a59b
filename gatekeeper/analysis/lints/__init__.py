"""The lints, by what they look at; each is a function from a rule set to findings."""
