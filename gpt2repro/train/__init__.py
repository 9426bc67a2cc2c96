"""How a run trains: launch, optimizer, schedule, safety, the first-step check, estimates."""
