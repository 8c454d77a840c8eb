"""What people look at: lines and bars while work goes on, pictures, and the frame of every HTML page."""
