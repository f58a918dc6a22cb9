//! `tiesmith diff`: in what two checkpoints differ. Exit code 1 if they do.

use tiesmith::{Change, Checkpoint, DiffOptions, DiffReport, IoMode, Observer, Result, TensorDiff, printable};

use super::args::DiffArgs;
use super::progress::Progress;
use super::table::Table;
use super::{DIFFERS, disk, human, print, print_json};

/// Most differing tensors that are listed.
const LISTED: usize = 20;

/// Runs the command.
pub fn run(args: &DiffArgs) -> Result<u8> {
    let progress = Progress::new(args.report.progress);
    let storage = disk(IoMode::Auto, &progress);
    let a = Checkpoint::open(&args.a, &storage)?;
    let b = Checkpoint::open(&args.b, &storage)?;
    for warning in a.warnings.iter().chain(&b.warnings) {
        progress.warn(warning);
    }
    let options = DiffOptions { atol: args.atol, max_ulp: args.max_ulp };
    let report = tiesmith::diff(&a, &b, &options, &progress)?;
    drop(progress);
    if args.report.json {
        print_json(&report)?;
    } else {
        print(&render(&report, args.atol.is_some() || args.max_ulp.is_some()))?;
    }
    Ok(if report.identical { 0 } else { DIFFERS })
}

fn render(report: &DiffReport, tolerant: bool) -> String {
    let tensors = human::plural(report.tensors, "tensor");
    let elements = human::plural(report.elements, "element");
    if report.identical {
        let how = if tolerant { " within the tolerance" } else { "" };
        return format!("identical{how}: {tensors}, {elements}\n");
    }
    let differing = human::plural(report.differences.len() as u64, "tensor");
    let (a, b) = (printable(&report.a), printable(&report.b));
    let mut text = format!("different: {differing} (A is {a}, B is {b}, {tensors} in both)\n");
    let mut table = Table::new("  ", "llrrrr");
    // A column without cells vanishes, its head included only where something is under it.
    let nan = report.differences.iter().any(|difference| difference.nan_mismatches > 0);
    let nan = if nan { "NaN" } else { "" };
    table.row(["tensor", "differs in", "largest |A-B|", "ulp", nan, "first at"]);
    for difference in report.differences.iter().take(LISTED) {
        table.row(cells(difference));
    }
    text.push_str(&table.render());
    if let Some(rest @ 1..) = report.differences.len().checked_sub(LISTED) {
        text.push_str(&format!("  ... and {rest} more\n"));
    }
    text
}

fn cells(difference: &TensorDiff) -> [String; 6] {
    let what = match difference.change {
        Change::OnlyInA => "only in A".to_string(),
        Change::OnlyInB => "only in B".to_string(),
        Change::Shape => {
            let [a, b] = difference.shapes.each_ref().map(|shape| human::shape(shape.as_deref().unwrap_or(&[])));
            format!("shape: {a}, {b}")
        }
        Change::Dtype => {
            let [a, b] = difference.dtypes.each_ref().map(|dtype| dtype.as_deref().unwrap_or("none"));
            format!("type: {a}, {b}")
        }
        Change::Values => {
            let (differing, all) = (human::grouped(difference.differing), human::grouped(difference.elements));
            format!("{differing} of {all} values")
        }
    };
    let count = |count: Option<u64>| count.map(human::grouped).unwrap_or_default();
    [
        printable(&difference.name),
        what,
        difference.max_abs.map(human::significant).unwrap_or_default(),
        count(difference.max_ulp),
        count(Some(difference.nan_mismatches).filter(|&n| n > 0)),
        count(difference.first_index),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(name: &str, change: Change) -> TensorDiff {
        TensorDiff {
            name: name.into(),
            change,
            dtypes: [Some("BF16".into()), Some("F32".into())],
            shapes: [Some(vec![2, 3]), Some(vec![3, 2])],
            elements: 0,
            differing: 0,
            nan_mismatches: 0,
            max_abs: None,
            max_ulp: None,
            first_index: None,
        }
    }

    fn report(differences: Vec<TensorDiff>) -> DiffReport {
        let identical = differences.is_empty();
        DiffReport { a: "x".into(), b: "y".into(), identical, tensors: 2, elements: 12_000, differences }
    }

    #[test]
    fn equal_checkpoints_are_one_line() {
        assert_eq!(render(&report(Vec::new()), false), "identical: 2 tensors, 12,000 elements\n");
        let text = render(&report(Vec::new()), true);
        assert!(text.starts_with("identical within the tolerance: 2 tensors"), "{text}");
    }

    #[test]
    fn differences_are_a_table() {
        let values = TensorDiff {
            elements: 4096,
            differing: 17,
            max_abs: Some(0.03125),
            max_ulp: Some(4),
            first_index: Some(1024),
            ..difference("w", Change::Values)
        };
        let text = render(
            &report(vec![
                difference("gone", Change::OnlyInA),
                difference("turned", Change::Shape),
                difference("wider", Change::Dtype),
                values,
            ]),
            false,
        );
        let expected = "\
different: 4 tensors (A is x, B is y, 2 tensors in both)
  tensor  differs in             largest |A-B|  ulp  first at
  gone    only in A
  turned  shape: [2, 3], [3, 2]
  wider   type: BF16, F32
  w       17 of 4,096 values            0.0312    4     1,024
";
        assert_eq!(text, expected, "\n{text}");
    }

    #[test]
    fn long_lists_are_cut_with_a_count() {
        let many = (0..25).map(|i| difference(&format!("t{i}"), Change::OnlyInB)).collect();
        let text = render(&report(many), false);
        assert!(text.ends_with("  t19     only in B\n  ... and 5 more\n"), "{text}");
    }
}
