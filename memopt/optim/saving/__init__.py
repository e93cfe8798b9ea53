"""What an optimizer is outside its process: its state_dict, DTensors in it, copies and pickles."""
