"""Language models: loading them, splitting a backbone, log-probs and losses inside one forward."""
