"""Measures of a sweep's cells, by TensorBoard tag or key in scores.json and costs.json, with their titles in tables."""

SCALE_LOSS = "val_scale_loss/"  # followed by the name of the scale, see ScaleSchedule.names
TRAINING_RATE = "perf/images_per_s"
LOSSES = {
    "val/loss": "validation loss",
    "val/loss_last_scale": "loss of the last scale",
    "train/loss": "training loss",
}
SCORES = {
    "frechet_distance": "Frechet distance",
    "spatial_frechet_distance": "sFID",
    "kernel_distance": "kernel distance",
    "mind": "MIND",
    "frechet_distance_over_floor": "distance over floor",
    "inception_score": "inception score",
    "vendi_score": "Vendi score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "classifier_accuracy_on_samples": "classifier accuracy on samples",
    "svm_accuracy_on_samples": "SVM accuracy on samples",
    "svm_accuracy_trained_on_samples": "accuracy of SVM trained on samples",
}
TRAINING_SCORES = {
    "val/fid": "Frechet distance in training",
    "val/mind": "MIND in training",
    "val/is": "inception score in training",
    "val/precision": "precision in training",
    "val/recall": "recall in training",
}
DISTANCES = ("frechet_distance", "val/fid")  # from `evaluate`; without it, from the training callback
COSTS = {
    "parameters": "parameters",
    "flops_per_training_image": "FLOPs per training image",
    "flops_per_sampled_image": "FLOPs per sampled image",
    "token_steps_per_image": "token-steps per sampled image",
    "state_bytes_per_image": "state bytes per image",
}
RATES = {TRAINING_RATE: "training images/s", "images_per_s": "sampling images/s"}
TITLES = LOSSES | SCORES | TRAINING_SCORES | COSTS | RATES
