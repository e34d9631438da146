"""Models on disk and in use: base models, reward model and judge, the critic; what they read, answer and score."""
