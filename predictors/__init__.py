"""What is predicted, and by what: MoE layers, speculation, the residual MLP, its metrics and its files."""
