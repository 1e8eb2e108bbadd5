"""What a trained autoencoder does to the model that its data came from."""
