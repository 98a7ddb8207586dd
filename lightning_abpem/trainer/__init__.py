"""Lightning's side: a run of the Trainer, its strategies, its log."""
