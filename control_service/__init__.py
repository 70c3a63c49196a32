"""The control service: projects, datasets, the queue and the history of every training job."""
