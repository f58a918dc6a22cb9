//! Aligned columns of plain text.

/// Rows of cells, printed with two spaces between columns; numbers (right) and words (left) aligned by column.
pub struct Table {
    indent: &'static str,
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with one character of `alignment` per column: `l` (left) or `r` (right).
    pub fn new(indent: &'static str, alignment: &str) -> Self {
        Self { indent, right: alignment.chars().map(|c| c == 'r').collect(), rows: Vec::new() }
    }

    /// Adds a row. Missing cells are empty.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// The text, each line ended by a newline and without trailing spaces.
    pub fn render(&self) -> String {
        let cell_chars = |row: &Vec<String>, column: usize| row.get(column).map_or(0, |cell| cell.chars().count());
        let columns = self.right.len();
        let widths: Vec<usize> =
            (0..columns).map(|column| self.rows.iter().map(|row| cell_chars(row, column)).max().unwrap_or(0)).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::from(self.indent);
            for column in (0..columns).filter(|&column| widths[column] > 0) {
                let padding = " ".repeat(widths[column] - cell_chars(row, column));
                let cell = row.get(column).map_or("", String::as_str);
                if line.len() > self.indent.len() {
                    line.push_str("  ");
                }
                let (before, after) = if self.right[column] { (padding.as_str(), "") } else { ("", padding.as_str()) };
                line.extend([before, cell, after]);
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_empty_columns_vanish() {
        let mut table = Table::new("  ", "lrlr");
        table.row(["name", "size", "", "x"]);
        table.row(["größer", "12 B", "", ""]);
        table.row(["a", "1.5 GB", "", "10"]);
        assert_eq!(table.render(), "  name      size   x\n  größer    12 B\n  a       1.5 GB  10\n");
    }
}
