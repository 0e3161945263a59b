"""Questions about rules: what they say, where they are weak, why a decision is what it is."""
