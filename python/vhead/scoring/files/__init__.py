"""From a file of rollouts to a file of their scores: the outputs, the journal that resumes them, and their schema."""
