"""What goes together: facts about choices, rules over facts, and one error that renders them."""
