"""What Apache runs. Nothing else belongs here: when this file was changed, Apache may run it anew in the same process."""

from members import application
