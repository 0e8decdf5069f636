import type { FormEvent } from 'react'

import { compare, keepRevision, restoreProject, useProjectEditorStore as useStore } from './store.ts'

/** The revisions that are kept: by name, and the ends of turns. Each can be compared with now, and brought back. */
export default function Checkpoints() {
  const checkpoints = useStore((state) => state.checkpoints)
  if (!checkpoints) return null
  const { kept, compared } = checkpoints

  const keep = (event: FormEvent<HTMLFormElement>) => {
    event.preventDefault()
    const name = new FormData(event.currentTarget).get('name')
    if (typeof name === 'string' && name.trim()) void keepRevision(name.trim())
    event.currentTarget.reset()
  }

  return (
    <section className="panel" aria-label="Checkpoints">
      <form className="bar" onSubmit={keep}>
        <label>Keep the project as it is now, as <input name="name" required maxLength={200} placeholder="before the redesign" /></label>
        <button type="submit">Keep</button>
        <button type="button" onClick={() => useStore.setState({ checkpoints: null })}>Close</button>
      </form>
      {kept.length === 0 ? (
        <p className="hint">Nothing is kept yet. The end of each AI's turn is kept by itself.</p>
      ) : (
        <table>
          <thead><tr><th scope="col">revision</th><th scope="col">what</th><th scope="col">when</th><th scope="col"><span className="unseen">actions</span></th></tr></thead>
          <tbody>
            {kept.map(({ revision, name, label, created_at }) => (
              <tr key={`${revision} ${name}`}>
                <td>{revision}</td>
                <td>{name ?? <>the end of a turn{label && `: ${label}`}</>}</td>
                <td>{new Date(created_at).toLocaleString()}</td>
                <td>
                  <button onClick={() => compare(revision)}>Compare with now</button>{' '}
                  <button onClick={() => restoreProject(revision)}>Go back to it</button>
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
      {compared && (
        <>
          <h2>From revision {compared.revision} to now</h2>
          {compared.diff ? <pre tabIndex={0}>{compared.diff}</pre> : <p className="hint">Nothing has changed.</p>}
        </>
      )}
    </section>
  )
}
