"""The control service: keeps projects, datasets, the queue and the history of every training job."""
