//! The summary in plain words: what conflicts, how much, which density keeps what, which layers to look at.

use super::data::{Analysis, Group, Line};
use super::figures::chosen_density;
use super::svg::{number, percent};
use crate::error::printable;

/// A density is said to keep nearly all from this share of Σ τ² on.
const NEARLY_ALL: f64 = 0.9;
/// Kept fractions above what was asked for by more than this share of it are worth a word.
const EXCESS: f64 = 0.1;
/// Layers that are named.
const NAMED_LAYERS: usize = 3;

/// One remark of the summary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remark {
    /// What it is about.
    pub about: &'static str,
    /// What there is to say.
    pub text: String,
}

/// All there is to say in words.
pub fn remarks(analysis: &Analysis) -> Vec<Remark> {
    let mut remarks = Vec::new();
    let mut say = |about, text: Option<String>| remarks.extend(text.map(|text| Remark { about, text }));
    if analysis.models.len() > 1 {
        say("What conflicts", conflicts(analysis));
        say("Who agrees", likeness(analysis));
    }
    say("Which density keeps what", densities(analysis));
    say("Ties", ties(analysis));
    if analysis.models.len() > 1 {
        say("What survives", survival(analysis));
    }
    say("Which layers to look at", layers(analysis));
    remarks
}

fn conflicts(analysis: &Analysis) -> Option<String> {
    let rate = analysis.chosen().conflict_fraction?;
    let contested: u64 = analysis.overall.influential.iter().skip(2).sum();
    let mut text = format!(
        "Trimmed to {}, {} of the {} parameters are pulled in opposite directions by different models.",
        chosen_density(analysis),
        percent(rate),
        grouped(analysis.overall.elements)
    );
    // A density of 1 is always looked at.
    let full = analysis.settings.densities.iter().position(|k| *k == Some(1.0));
    let full = full.filter(|at| *at != analysis.settings.chosen);
    if let Some(untrimmed) = full.and_then(|at| analysis.overall.densities[at].conflict_fraction) {
        text.push_str(&format!(" Without a trim it would be {}.", percent(untrimmed)));
    }
    if contested > 0 {
        let of_contested = analysis.chosen().conflicts as f64 / contested as f64;
        text.push_str(&format!(
            " Of the parameters that survive in two models or more, {} are in conflict.",
            percent(of_contested)
        ));
    }
    if let Some(chance) = analysis.chance_of_conflict().filter(|chance| *chance > 0.0) {
        let ratio = rate / chance;
        let judgement = match ratio {
            r if r < 0.5 => "the models agree far more often than chance would have it",
            r if r < 0.9 => "the models agree more often than chance would have it",
            r if r <= 1.1 => "the signs look unrelated",
            _ => "the models pull against each other more than chance would have it",
        };
        text.push_str(&format!(
            " Signs drawn at random would put {} of all in conflict: {judgement}.",
            percent(chance)
        ));
    }
    Some(text)
}

fn likeness(analysis: &Analysis) -> Option<String> {
    let cosines = &analysis.overall.pairs.cosine;
    let mut pairs: Vec<((usize, usize), f64)> =
        analysis.pairs().into_iter().zip(cosines).filter_map(|(pair, cosine)| Some((pair, (*cosine)?))).collect();
    pairs.sort_by(|a, b| a.1.total_cmp(&b.1));
    let (least, most) = (pairs.first()?, pairs.last()?);
    let name =
        |(a, b): (usize, usize)| format!("{} and {}", printable(&analysis.models[a]), printable(&analysis.models[b]));
    if pairs.len() == 1 {
        return Some(format!("The cosine of the two task vectors is {}; 0 is unrelated.", number(most.1)));
    }
    Some(format!(
        "The task vectors most alike are those of {} (cosine {}), the least alike those of {} ({}).",
        name(most.0),
        number(most.1),
        name(least.0),
        number(least.1)
    ))
}

fn densities(analysis: &Analysis) -> Option<String> {
    let least_of = |at: usize| {
        let kept = analysis.overall.densities[at].norm_kept.iter().flatten();
        kept.copied().fold(None, |least: Option<f64>, kept| Some(least.map_or(kept, |l| l.min(kept))))
    };
    let most_of = |at: usize| analysis.overall.densities[at].norm_kept.iter().flatten().copied().fold(0.0, f64::max);
    let chosen = analysis.settings.chosen;
    let (least, most) = (least_of(chosen)?, most_of(chosen));
    let range = match percent(least) == percent(most) {
        true => percent(least),
        false => format!("between {} and {}", percent(least), percent(most)),
    };
    let mut text = format!(
        "Keeping {} of the entries keeps {range} of each task vector's squared length.",
        chosen_density(analysis)
    );
    let enough = analysis.settings.densities.iter().enumerate().find_map(|(at, density)| {
        let density = (*density)?;
        (least_of(at)? >= NEARLY_ALL).then_some(density)
    });
    match enough {
        Some(density) if density < 1.0 => text.push_str(&format!(
            " Of the densities looked at, {} is the smallest that keeps {} for every model.",
            percent(density),
            percent(NEARLY_ALL)
        )),
        _ => {
            text.push_str(&format!(" None of the densities below 100 % keeps {} for every model.", percent(NEARLY_ALL)))
        }
    }
    Some(text)
}

fn ties(analysis: &Analysis) -> Option<String> {
    let asked = &analysis.settings.chosen_per_model;
    let kept = &analysis.chosen().kept_fraction;
    let over = kept.iter().zip(asked).enumerate().filter_map(|(model, (kept, &asked))| {
        kept.filter(|kept| *kept > asked * (1.0 + EXCESS)).map(|kept| (model, kept, asked))
    });
    let (model, kept, asked) = over.max_by(|a, b| (a.1 / a.2).total_cmp(&(b.1 / b.2)))?;
    Some(format!(
        "Many entries equal the threshold: of {}, {} are kept where {} were asked for. '--trim-ties sample' keeps an even \
         share of them.",
        printable(&analysis.models[model]),
        percent(kept),
        percent(asked)
    ))
}

fn survival(analysis: &Analysis) -> Option<String> {
    let shares: Vec<(usize, f64)> =
        analysis.overall.survival.iter().enumerate().filter_map(|(model, s)| Some((model, s.of_kept?))).collect();
    let least = shares.iter().min_by(|a, b| a.1.total_cmp(&b.1))?;
    let most = shares.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
    Some(format!(
        "Of what the trim keeps, {} comes through the election best ({} of its entries point the merged way) and {} worst \
         ({}).",
        printable(&analysis.models[most.0]),
        percent(most.1),
        printable(&analysis.models[least.0]),
        percent(least.1)
    ))
}

fn layers(analysis: &Analysis) -> Option<String> {
    if analysis.layers.len() < 2 {
        return None;
    }
    let chosen = analysis.settings.chosen;
    let ranked = |value: fn(&Line) -> Option<f64>| {
        let mut all: Vec<(&Group, f64)> =
            analysis.layers.iter().filter_map(|g| Some((g, value(&Line::of(&g.measured, chosen))?))).collect();
        all.retain(|(_, value)| *value > 0.0);
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        let named = all
            .iter()
            .take(NAMED_LAYERS)
            .map(|(group, value)| format!("{} ({})", printable(&group.name), percent(*value)));
        named.collect::<Vec<_>>().join(", ")
    };
    let norms = Some(ranked(|line| line.norm_share)).filter(|names| !names.is_empty())?;
    let mut text = format!("The task vectors are longest in {norms}; the percentages are of their squared length.");
    let conflicts = ranked(|line| line.conflicts);
    if analysis.models.len() > 1 && !conflicts.is_empty() {
        text.push_str(&format!(" The largest share of conflicting parameters is in {conflicts}."));
    }
    Some(text)
}

/// Thousands apart.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_stand_apart() {
        assert_eq!([0, 999, 1000, 6_738_415_616].map(grouped), ["0", "999", "1,000", "6,738,415,616"]);
    }
}
