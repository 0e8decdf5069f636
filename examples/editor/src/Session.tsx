import { useEffect } from 'react'

import { showSession, useProjectEditorStore as useStore } from './store.ts'

const PARTS: Record<string, string> = {
  hydrated: 'files on the disk',
  modules: 'node_modules in place',
  dev_server: 'dev server started',
  first_page: 'first page',
  shown: 'on a screen',
}

/** How the session's start went, part by part, and how its agent and dev server are now. */
export default function Session() {
  const session = useStore((state) => state.session)
  useEffect(() => {
    const timer = setInterval(showSession, 2000)
    return () => clearInterval(timer)
  }, [])
  if (!session) return null
  const { state, agent } = session
  const ends = Object.entries(agent?.start ?? {}).sort(([, one], [, other]) => one - other)
  const whole = ends.at(-1)?.[1] ?? 1
  return (
    <section className="panel" aria-label="Session">
      <div className="bar">
        <span>
          The session is <b>{state}</b>, its agent <b>{agent?.state ?? 'not heard of'}</b>, the agent's link <b>{agent?.link?.replace('_', ' ') ?? 'not heard of'}</b>, the dev server <b>{agent?.dev_server ?? 'not heard of'}</b>.
        </span>
        <button onClick={() => useStore.setState({ session: null })}>Close</button>
      </div>
      <h2>Start</h2>
      <table className="start">
        <tbody>
          {ends.map(([part, end], index) => {
            const begun = ends[index - 1]?.[1] ?? 0
            return (
              <tr key={part}>
                <th scope="row">{PARTS[part] ?? part}</th>
                <td><span className="part" style={{ marginLeft: `${(begun / whole) * 100}%`, width: `${Math.max(0.5, ((end - begun) / whole) * 100)}%` }} /></td>
                <td>{(end - begun).toFixed(2)} s</td>
              </tr>
            )
          })}
        </tbody>
      </table>
      <h2>Problems</h2>
      {agent?.problems.length ? (
        <ul className="problems">
          {agent.problems.map((problem, index) => (
            <li key={index}><b>{problem.kind}</b> {problem.file_path} <span>{problem.detail}</span></li>
          ))}
        </ul>
      ) : (
        <p className="hint">None.</p>
      )}
    </section>
  )
}
