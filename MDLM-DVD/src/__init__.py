"""What runs a drafter and a verifier: the broker, the registry, the loop, and the leaves they share. It knows no family."""
