//! Which part this process is, from what schedulers put into the environment of the processes they start.
//!
//! Slurm arrays, Kubernetes Indexed Jobs, Open MPI, PMI (MPICH, Intel MPI, srun --mpi), srun and GNU parallel.

use tiesmith::{Error, Part, Result};

/// What `--part` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartSpec {
    /// This one.
    Given(Part),
    /// What the environment says, of so many parts if it does not say of how many.
    Auto(Option<usize>),
}

/// Variables of one scheduler.
struct Scheduler {
    name: &'static str,
    index: &'static str,
    /// What the first index is: a number, or the name of a variable.
    first: First,
    count: Option<&'static str>,
}

enum First {
    Number(u64),
    Variable(&'static str),
}

/// Those of arrays go before those of the processes within a job.
const SCHEDULERS: [Scheduler; 6] = [
    Scheduler {
        name: "Slurm array",
        index: "SLURM_ARRAY_TASK_ID",
        first: First::Variable("SLURM_ARRAY_TASK_MIN"),
        count: Some("SLURM_ARRAY_TASK_COUNT"),
    },
    Scheduler { name: "Kubernetes Indexed Job", index: "JOB_COMPLETION_INDEX", first: First::Number(0), count: None },
    Scheduler {
        name: "Open MPI",
        index: "OMPI_COMM_WORLD_RANK",
        first: First::Number(0),
        count: Some("OMPI_COMM_WORLD_SIZE"),
    },
    Scheduler { name: "PMI", index: "PMI_RANK", first: First::Number(0), count: Some("PMI_SIZE") },
    Scheduler { name: "GNU parallel", index: "PARALLEL_SEQ", first: First::Number(1), count: None },
    Scheduler { name: "srun", index: "SLURM_PROCID", first: First::Number(0), count: Some("SLURM_NTASKS") },
];

impl PartSpec {
    /// The part; `env` gives the value of a variable.
    pub fn resolve(self, env: impl Fn(&str) -> Option<String>) -> Result<Part> {
        match self {
            Self::Given(part) => Ok(part),
            Self::Auto(count) => from_environment(count, env),
        }
    }
}

fn from_environment(given: Option<usize>, env: impl Fn(&str) -> Option<String>) -> Result<Part> {
    let number =
        |name: &str| match env(name).map(|value| value.trim().parse::<u64>()) {
            None => Ok(None),
            Some(Ok(number)) => Ok(Some(number)),
            Some(Err(_)) => Err(Error::usage(format!("{name} in the environment is not a number"))
                .help("name the part, as in --part 2/8")),
        };
    for Scheduler { name, index, first, count } in &SCHEDULERS {
        let Some(index) = number(index)? else { continue };
        let first = match first {
            First::Number(first) => *first,
            First::Variable(name) => number(name)?.unwrap_or(0),
        };
        let said = match count {
            Some(count) => number(count)?,
            None => None,
        };
        let Some(count) = given.map(|count| count as u64).or(said) else {
            return Err(Error::usage(format!("{name} does not say of how many parts this is one"))
                .help("say it, as in --part auto/8"));
        };
        let place = index.checked_sub(first).filter(|&place| place < count);
        return match place {
            Some(place) => Ok(Part { index: place as usize, count: count as usize }),
            None => {
                Err(Error::usage(format!("{name} gave this process number {index}, which is none of {count} parts"))
                    .help("name the part, as in --part 2/8"))
            }
        };
    }
    Err(Error::usage("--part auto finds no scheduler in the environment").help("name the part, as in --part 2/8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(given: Option<usize>, variables: &[(&str, &str)]) -> Result<Part> {
        let value = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_string());
        PartSpec::Auto(given).resolve(value)
    }

    #[test]
    fn every_scheduler_is_understood() {
        let slurm = |id| [("SLURM_ARRAY_TASK_ID", id), ("SLURM_ARRAY_TASK_MIN", "1"), ("SLURM_ARRAY_TASK_COUNT", "6")];
        let part = |index, count| Part { index, count };
        assert_eq!(resolve(None, &slurm("1")).unwrap(), part(0, 6));
        assert_eq!(resolve(None, &slurm("6")).unwrap(), part(5, 6));
        assert_eq!(resolve(Some(4), &[("JOB_COMPLETION_INDEX", "3")]).unwrap(), part(3, 4));
        let mpi = [("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
        assert_eq!(resolve(None, &mpi).unwrap(), part(1, 2));
        assert_eq!(resolve(None, &[("PMI_RANK", "0"), ("PMI_SIZE", "3")]).unwrap(), part(0, 3));
        assert_eq!(resolve(Some(5), &[("PARALLEL_SEQ", "5")]).unwrap(), part(4, 5));
        assert_eq!(resolve(None, &[("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2")]).unwrap(), part(1, 2));
    }

    #[test]
    fn what_is_missing_or_senseless_is_said() {
        let message = |given, variables: &[(&str, &str)]| resolve(given, variables).unwrap_err().to_string();
        assert!(message(None, &[]).contains("no scheduler"));
        assert!(message(None, &[("JOB_COMPLETION_INDEX", "3")]).contains("--part auto/8"));
        assert!(message(Some(3), &[("JOB_COMPLETION_INDEX", "3")]).contains("number 3, which is none of 3 parts"));
        assert!(message(Some(3), &[("PMI_RANK", "x")]).contains("PMI_RANK in the environment is not a number"));
        assert!(message(Some(3), &[("PARALLEL_SEQ", "0")]).contains("none of 3"));
    }
}
