"""Pictures and live views. Each is drawn from what a run left behind, and looks the same everywhere."""
